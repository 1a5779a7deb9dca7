"""Exact log-probabilities and entropy of a policy whose vocabulary is split over tensor-parallel ranks.

Two entries with one arithmetic: ``log_probs_and_entropy`` from logits, ``linear_log_probs_and_entropy`` from
the hidden states and the output weight, where logits exist one block of columns at a time. Each gives, per token, the
log-probability of the target at T=1, the entropy at T=1 and, if asked, the log-probability at another temperature and
the moment that the entropy's response to an update depends on. Two collectives in all (one MAX, one packed SUM)
whatever the blocks; none without tensor parallelism. The backward pass recomputes and communicates nothing.

A kernel (``logprobs_torch``, ``logprobs_triton``) adds a block of logits to each token's running maximum and sums
(online softmax, arXiv 1805.02867) and turns a block into its gradient; everything else is here. docs/logprobs.md has
the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_ext import logprobs_torch

# Tokens and columns of a block of the fused entry. CPU: 4 MiB of float32, near the last cache and wide enough for the
# matrix product. Elsewhere 64 MiB in bf16, and half as much again for 4096 hidden states of 5120 in float32.
_TILE_CPU = (2048, 512)
_TILE = (4096, 8192)


class Outputs(NamedTuple):
    """Float32 ``[n]`` in nats, equal on all ranks of the group."""

    log_probs: torch.Tensor  # of the targets at T=1
    entropy: torch.Tensor  # at T=1
    tempered: torch.Tensor | None  # log-probs at the temperature asked for
    moment: torch.Tensor | None  # sum_k pi_k^2 (log pi_k + H), at T=1


def log_probs_and_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    temperature: float | torch.Tensor | None = None,
    entropy_grad: bool = False,
    moment: bool = False,
    kernel: str = "auto",
) -> Outputs:
    """Per-token log-probability and exact entropy at T=1, and log-probability at ``temperature``.

    The logits buffer is donated: backward overwrites it with its own gradient, so nothing else may read the logits
    after backward, they must not be a leaf, and a second backward through the same graph raises.

    Args:
        logits: float32 or bfloat16 ``[n, v_local]``, this rank's contiguous columns; rank ``r`` of ``group`` owns the
            global ids from ``r * v_local`` on. ``-inf`` means probability 0. At least one logit of a row is finite.
        targets: int64 ``[n]``, global ids. An id outside ``[0, vocab_size)`` gives NaN, never a plausible number.
        vocab_size: columns with a global id from here on are padding: probability and gradient exactly 0. group: the
        tensor-parallel group; ``None`` or a group of one: no communication. temperature: T > 0 of the third result, one
        for all or float32 ``[n]`` (where that is not above 0: NaN); ``None``:
            there is none.
        entropy_grad: whether the entropy takes part in autograd (entropy bonus).
        moment: whether the fourth result is wanted.
        kernel: ``torch``, ``triton`` (CUDA), or ``auto``: triton on CUDA, else torch. Changes speed, never results.

    Returns:
        ``log_probs`` is differentiable, ``entropy`` only if ``entropy_grad``, ``tempered`` and ``moment`` never; what
        was not asked for is ``None``.
    """
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("logits is a leaf: its buffer is overwritten by backward; pass the output of an operation")
    job = _Job.of(targets, logits.shape[1], vocab_size, group, temperature, entropy_grad, moment, kernel)
    return job.outputs(_FromLogits.apply(logits, job))


def linear_log_probs_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    temperature: float | torch.Tensor | None = None,
    entropy_grad: bool = False,
    moment: bool = False,
    kernel: str = "auto",
    tile: tuple[int, int] | None = None,
) -> Outputs:
    """As ``log_probs_and_entropy`` of ``hidden @ weight.T``, of which no more than one block exists at a time.

    The backward pass computes each block again: four matrix products in all where the logits kept whole take three.
    Beside the two gradients it needs memory for a block, whatever the number of tokens and the vocabulary.

    Args:
        hidden: float32 or bfloat16 ``[n, h]``, the same on all ranks of ``group``. Its gradient is this rank's columns'
        share of
            the whole: enter through megatron's ``copy_to_tensor_model_parallel_region`` (or a gather of
            sequence-parallel parts), whose backward adds the shares up.
        weight: ``[v_local, h]``, this rank's contiguous rows of the output weight, in the type of ``hidden``. tile:
        tokens and columns of a block; by default what suits the device. Changes memory and speed, results by rounding
        only
            (in bf16 the weight's gradient is rounded once per ``tile[0]`` tokens).
        targets, vocab_size, group, temperature, entropy_grad, moment, kernel: as there.
    """
    job = _Job.of(targets, weight.shape[0], vocab_size, group, temperature, entropy_grad, moment, kernel)
    return job.outputs(_FromHidden.apply(hidden, weight, job, tile))


@dataclass(frozen=True)
class _Job:
    """What both entries are asked, and the columns that this rank answers for."""

    kernel: ModuleType
    column: torch.Tensor  # int64 [n]: the target's column on this rank; elsewhere it lies outside [0, width)
    known: torch.Tensor  # bool [n]: the target is in the vocabulary
    width: int  # columns that are not padding
    group: dist.ProcessGroup | None
    inverse_temperature: torch.Tensor | None  # float32 [n]
    entropy_grad: bool
    moment: bool

    @classmethod
    def of(
        cls,
        targets: torch.Tensor,
        local_columns: int,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        temperature: float | torch.Tensor | None,
        entropy_grad: bool,
        moment: bool,
        kernel: str,
    ) -> _Job:
        first = 0 if group is None else dist.get_rank(group) * local_columns
        return cls(
            kernel=_kernel(kernel, targets.device),
            column=targets - first,
            known=(targets >= 0) & (targets < vocab_size),
            width=min(max(vocab_size - first, 0), local_columns),
            group=group,
            inverse_temperature=None if temperature is None else _inverse(temperature, targets),
            entropy_grad=entropy_grad,
            moment=moment,
        )

    def outputs(self, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Without the stand-ins for results that were not asked for."""
        log_probs, entropy, tempered, moment = results
        return Outputs(
            log_probs,
            entropy,
            tempered if self.inverse_temperature is not None else None,
            moment if self.moment else None,
        )

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Maximum ``[n]`` and sums of no logits, see ``logprobs_torch.accumulate``."""
        maximum = torch.full_like(self.column, logprobs_torch.FLOOR, dtype=torch.float32)
        return maximum, maximum.new_zeros(6 if self.moment else 4, len(self.column))

    def finish(self, maximum: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From this rank's maxima and sums: the results, and what backward needs: global maximum and log of the sum."""
        maximum = _reduce(maximum, sums, self.group, self.inverse_temperature)
        total, weighted, tempered_total, target_logit = sums[:4]
        log_total = total.log()
        target = torch.where(self.known, target_logit - maximum, torch.nan)
        tempered = target.new_empty(0)
        if self.inverse_temperature is not None:
            tempered = target * self.inverse_temperature - tempered_total.log()
        moment = target.new_empty(0)
        if self.moment:
            # log pi + H = x - (sum x e^x) / S: no difference of large numbers where one token has nearly all.
            squares, weighted_squares = sums[4:]
            moment = (weighted_squares - weighted / total * squares) / total.square()
        return target - log_total, log_total - weighted / total, tempered, moment, maximum, log_total

    def mark(self, ctx: Any, entropy: torch.Tensor, *constant: torch.Tensor) -> None:
        """Tell autograd which results have no gradient, and not to make zeros for those that got none."""
        ctx.job = self
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(constant if self.entropy_grad else (*constant, entropy)))


class _FromLogits(torch.autograd.Function):
    """See ``log_probs_and_entropy``.

    With shifted logits x = z - max z and S = sum e^x: log p = x_target - log S and H = log S - (sum x e^x) / S.
    Gradients: d log p / dz = onehot - p and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, job: _Job) -> tuple[torch.Tensor, ...]:
        maximum, sums = job.start()
        if job.width:
            block = logits[:, : job.width]
            job.kernel.accumulate(block, job.column, maximum, sums, job.inverse_temperature)
        log_probs, entropy, tempered, moment, maximum, log_total = job.finish(maximum, sums)
        ctx.save_for_backward(logits, maximum, log_total, entropy)
        job.mark(ctx, entropy, tempered, moment)
        return log_probs, entropy, tempered, moment

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Any, grad_entropy: Any, *_: None) -> tuple[torch.Tensor, None]:
        logits, maximum, log_total, entropy = ctx.saved_tensors
        job: _Job = ctx.job
        out = logits.detach()  # the donated buffer
        out[:, job.width :] = 0
        if job.width:
            upstream = _or_zeros(grad_log_probs, entropy), grad_entropy
            job.kernel.gradient_(out[:, : job.width], job.column, maximum, log_total, entropy, *upstream)
        return out, None


class _FromHidden(torch.autograd.Function):
    """See ``linear_log_probs_and_entropy``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, job: _Job, tile: tuple[int, int] | None
    ) -> tuple[torch.Tensor, ...]:
        tiles = _Tiles(hidden, job.width, tile)
        maximum, sums = job.start()
        for rows in tiles.rows:
            inverse = None if job.inverse_temperature is None else job.inverse_temperature[rows]
            for columns in tiles.columns:
                logits = tiles.logits(hidden[rows], weight[columns])
                column = job.column[rows] - columns.start
                job.kernel.accumulate(logits, column, maximum[rows], sums[:, rows], inverse)
        log_probs, entropy, tempered, moment, maximum, log_total = job.finish(maximum, sums)
        ctx.save_for_backward(hidden, weight, maximum, log_total, entropy)
        ctx.tile = tile
        job.mark(ctx, entropy, tempered, moment)
        return log_probs, entropy, tempered, moment

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Any, grad_entropy: Any, *_: None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, *per_token = ctx.saved_tensors
        job: _Job = ctx.job
        tiles = _Tiles(hidden, job.width, ctx.tile)
        per_token += [_or_zeros(grad_log_probs, per_token[0]), grad_entropy]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in tiles.rows:
            own = [None if each is None else each[rows] for each in per_token]
            total = torch.zeros_like(hidden[rows], dtype=torch.float32)
            for columns in tiles.columns:
                slope = tiles.logits(hidden[rows], weight[columns])
                job.kernel.gradient_(slope, job.column[rows] - columns.start, *own)
                if grad_weight is not None:
                    grad_weight[columns].addmm_(slope.t(), hidden[rows])
                if grad_hidden is not None:
                    _add_product(total, slope, weight[columns])
            if grad_hidden is not None:
                grad_hidden[rows] = total
        return grad_hidden, grad_weight, None, None


class _Tiles:
    """How tokens and columns are cut into blocks, and the memory that each block's logits are computed in."""

    def __init__(self, hidden: torch.Tensor, width: int, tile: tuple[int, int] | None) -> None:
        tokens, columns = tile or (_TILE_CPU if hidden.device.type == "cpu" else _TILE)
        self.rows = [slice(i, min(len(hidden), i + tokens)) for i in range(0, len(hidden), tokens)]
        self.columns = [slice(i, min(width, i + columns)) for i in range(0, width, columns)]
        self._space = hidden.new_empty(min(len(hidden), tokens) * min(width, columns))

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``hidden @ weight.T``, contiguous, until the next call."""
        shape = len(hidden), len(weight)
        return torch.mm(hidden, weight.t(), out=self._space[: shape[0] * shape[1]].view(shape))


def _kernel(name: str, device: torch.device) -> ModuleType:
    """The module that works on blocks of logits."""
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"kernel={name!r} is not known; choose auto, torch or triton")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return logprobs_torch
    from megatron_ext import logprobs_triton  # needs Triton, which not every machine has

    return logprobs_triton


def _inverse(temperature: float | torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 / T of every token; NaN where T is not above 0."""
    if isinstance(temperature, torch.Tensor):
        if temperature.shape != targets.shape:
            raise ValueError(f"temperature has shape {list(temperature.shape)}, targets {list(targets.shape)}")
        temperature = temperature.float()
        return torch.where(temperature > 0, 1 / temperature, torch.nan)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    return torch.full_like(targets, 1 / temperature, dtype=torch.float32)


def _reduce(
    local: torch.Tensor,
    sums: torch.Tensor,
    group: dist.ProcessGroup | None,
    inverse_temperature: torch.Tensor | None,
) -> torch.Tensor:
    """Add up ``sums`` over the group, in place, relative to the global maximum, which is returned."""
    if group is None or dist.get_world_size(group) == 1:
        return local
    maximum = local.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    logprobs_torch.rescale_(sums, local - maximum, inverse_temperature)
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    return maximum


def _or_zeros(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
