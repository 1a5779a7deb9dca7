"""Exact log-probabilities and entropy of a policy whose vocabulary is split over tensor-parallel ranks.

One pass over the logits gives, per token, the log-probability of the target at T=1, the entropy at T=1 and, if asked,
the log-probability at another temperature. Two collectives in all (one MAX, one packed SUM) whatever the chunking;
none without tensor parallelism. The backward pass recomputes and communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# Stands for -inf where a product with probability 0 must give 0, not NaN; finite after division by any usable T.
_FLOOR = -1e30
# At most this many logits are worked on at a time, whatever the vocabulary. CPU: 1 MiB per float32 temporary stays in
# cache (1.7 times faster than 64 MiB). Elsewhere 256 MiB: few kernels, bounded memory.
_CHUNK_LOGITS_CPU = 1 << 18
_CHUNK_LOGITS = 1 << 26


def log_probs_and_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    temperature: float | None = None,
    entropy_grad: bool = False,
    chunk: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Per-token log-probability and exact entropy at T=1, and log-probability at ``temperature``.

    The logits buffer is donated: backward overwrites it with its own gradient, so nothing else may read the logits
    after backward, they must not be a leaf, and a second backward through the same graph raises.

    Args:
        logits: float32 or bfloat16 ``[n, v_local]``, this rank's contiguous columns; rank ``r`` of ``group`` owns the
            global ids from ``r * v_local`` on. ``-inf`` means probability 0. At least one logit of a row is finite.
        targets: int64 ``[n]``, global ids. An id outside ``[0, vocab_size)`` gives NaN, never a plausible number.
        vocab_size: columns with a global id from here on are padding: probability and gradient exactly 0.
        group: the tensor-parallel group; ``None`` or a group of one: no communication.
        temperature: T > 0 of the third result; ``None``: there is none.
        entropy_grad: whether the entropy takes part in autograd (entropy bonus).
        chunk: most tokens worked on at a time; changes memory, never results.

    Returns:
        ``(log_probs, entropy, tempered)``, each float32 ``[n]`` in nats, equal on all ranks of the group. ``log_probs`` is
        differentiable, ``entropy`` only if ``entropy_grad``, ``tempered`` never (and ``None`` without ``temperature``).
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("logits is a leaf: its buffer is overwritten by backward; pass the output of an operation")
    log_probs, entropy, tempered = _LogProbsAndEntropy.apply(
        logits, targets, vocab_size, group, temperature, entropy_grad, chunk
    )
    return log_probs, entropy, tempered if temperature is not None else None


class _LogProbsAndEntropy(torch.autograd.Function):
    """See ``log_probs_and_entropy``.

    With shifted logits x = z - max z and S = sum e^x: log p = x_target - log S and H = log S - (sum x e^x) / S.
    Gradients: d log p / dz = onehot - p and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        temperature: float | None,
        entropy_grad: bool,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shard = _Shard(logits, targets, vocab_size, group, chunk)
        maximum, sums = _local_sums(logits, shard, temperature)
        maximum = _reduce(maximum, sums, group, temperature)
        total, weighted, tempered_total, target_logit = sums
        log_total = total.log()
        target_logit = torch.where(shard.known(vocab_size), target_logit - maximum, torch.nan)
        log_probs = target_logit - log_total
        entropy = log_total - weighted / total
        tempered = log_probs.new_empty(0) if temperature is None else target_logit / temperature - tempered_total.log()
        ctx.save_for_backward(logits, maximum, log_total, entropy)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([tempered] if entropy_grad else [tempered, entropy]))
        return log_probs, entropy, tempered

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Any, grad_entropy: Any, *_: None) -> tuple[torch.Tensor | None, ...]:
        logits, maximum, log_total, entropy = ctx.saved_tensors
        shard: _Shard = ctx.shard
        out = logits.detach()  # the donated buffer
        out[:, shard.width :] = 0
        for rows in shard.chunks():
            log_p = out[rows, : shard.width].float().sub(maximum[rows, None]).sub_(log_total[rows, None])
            p = log_p.exp()
            if grad_entropy is None:
                grad = p.mul_(-grad_log_probs[rows, None])
            else:
                slope = log_p.clamp_(min=_FLOOR).add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
                grad = p.mul_(slope if grad_log_probs is None else slope.add_(grad_log_probs[rows, None])).neg_()
            if grad_log_probs is not None and shard.width:
                column, mine = shard.columns(rows)
                grad.scatter_add_(1, column[:, None], (grad_log_probs[rows] * mine)[:, None])
            out[rows, : shard.width] = grad.to(out.dtype)
        return out, None, None, None, None, None, None


class _Shard:
    """Which columns of the vocabulary this rank holds, and how its tokens are cut into chunks."""

    def __init__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        chunk: int,
    ) -> None:
        tokens, columns = logits.shape
        self.targets = targets
        self.first = 0 if group is None else dist.get_rank(group) * columns
        self.width = min(max(vocab_size - self.first, 0), columns)  # columns that are not padding
        most = _CHUNK_LOGITS_CPU if logits.device.type == "cpu" else _CHUNK_LOGITS
        step = max(1, min(chunk, most // max(1, columns)))
        self._bounds = [(start, min(tokens, start + step)) for start in range(0, tokens, step)]

    def chunks(self) -> list[slice]:
        """Slices of tokens, in order."""
        return [slice(start, end) for start, end in self._bounds]

    def columns(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Local column of each target (any valid one where the target lives elsewhere) and whether it lives here."""
        local = self.targets[rows] - self.first
        mine = (local >= 0) & (local < self.width)
        return local.clamp(0, max(0, self.width - 1)), mine

    def known(self, vocab_size: int) -> torch.Tensor:
        """Bool ``[n]``: the target is in the vocabulary."""
        return (self.targets >= 0) & (self.targets < vocab_size)


def _local_sums(logits: torch.Tensor, shard: _Shard, temperature: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's maximum ``[n]`` and sums ``[4, n]``: e^x, x e^x, e^(x/T), target logit; x relative to that maximum."""
    tokens = logits.shape[0]
    maximum = logits.new_full((tokens,), -torch.inf, dtype=torch.float32)
    sums = logits.new_zeros((4, tokens), dtype=torch.float32)
    if shard.width == 0:
        return maximum, sums
    for rows in shard.chunks():
        z = logits[rows, : shard.width].float()
        maximum[rows] = z.amax(-1)
        column, mine = shard.columns(rows)
        sums[3, rows] = torch.where(mine, z.gather(1, column[:, None])[:, 0], 0.0)
        # A shard whose logits are all -inf has no finite maximum; its sums are 0 whatever it is measured from.
        x = z.sub(maximum[rows, None].nan_to_num(neginf=0.0)).clamp_(min=_FLOOR)
        exp = x.exp()
        sums[0, rows] = exp.sum(-1)
        sums[1, rows] = exp.mul_(x).sum(-1)
        if temperature is not None:
            sums[2, rows] = x.div_(temperature).exp_().sum(-1)
    return maximum, sums


def _reduce(
    local: torch.Tensor, sums: torch.Tensor, group: dist.ProcessGroup | None, temperature: float | None
) -> torch.Tensor:
    """Add up ``sums`` over the group, in place, relative to the global maximum, which is returned."""
    if group is None or dist.get_world_size(group) == 1:
        return local
    maximum = local.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    shift = (local - maximum).clamp_(min=_FLOOR)
    scale = shift.exp()
    sums[1] = scale * (sums[1] + shift * sums[0])
    sums[0] *= scale
    if temperature is not None:
        sums[2] *= (shift / temperature).exp()
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    return maximum
