"""How three other trainers compute log-probs and entropy from a divided vocabulary.

Written here from a reading of their public sources.

The same mathematics at T=1, the best case of each: no temperature division, entropy without a graph where it is only a
metric. Sources read in August 2026: slime ``utils/ppo_utils.py``, verl ``utils/megatron/tensor_parallel.py`` and
``utils/experimental/torch_functional.py``, NeMo-RL ``distributed/model_utils.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

CHUNK = 512  # tokens, where a trainer chunks
MAX, SUM = dist.ReduceOp.MAX, dist.ReduceOp.SUM
Group = dist.ProcessGroup | None


def slime(logits: torch.Tensor, targets: torch.Tensor, group: Group, entropy_grad: bool) -> tuple[torch.Tensor, ...]:
    """Megatron's fused cross entropy on one copy of the logits, the entropy on another."""
    log_probs = _CrossEntropy.apply(logits.clone(), targets, group, True)
    with nullcontext() if entropy_grad else torch.no_grad():
        return log_probs, _Entropy.apply(logits.clone(), group)


def verl(logits: torch.Tensor, targets: torch.Tensor, group: Group, entropy_grad: bool) -> tuple[torch.Tensor, ...]:
    """The entropy on the logits, megatron's cross entropy (three collectives) on a copy."""
    copy = logits.clone()
    with nullcontext() if entropy_grad else torch.no_grad():
        entropy = _Entropy.apply(logits, group)
    return _CrossEntropy.apply(copy, targets, group, False), entropy


def nemo_rl(logits: torch.Tensor, targets: torch.Tensor, group: Group, entropy_grad: bool) -> tuple[torch.Tensor, ...]:
    """Chunks of tokens, each with its own collectives, computed again in the backward pass."""
    with nullcontext() if entropy_grad else torch.no_grad():
        entropy = _ChunkedEntropy.apply(logits, group)
    return _ChunkedLogProbs.apply(logits, targets, group), entropy


def verl_fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """verl's chunked projection in torch, which knows no tensor parallelism."""
    return _ChunkedLinear.apply(hidden, weight, targets)


def _reduce(tensor: torch.Tensor, op: dist.ReduceOp, group: Group) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _place(targets: torch.Tensor, columns: int, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Local column of each target (0 where it is elsewhere) and whether it is here."""
    local = targets - (0 if group is None else dist.get_rank(group) * columns)
    here = (local >= 0) & (local < columns)
    return torch.where(here, local, 0), here


class _CrossEntropy(torch.autograd.Function):
    """Works in its own copy of the logits, which becomes the softmax that backward turns into the gradient."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, targets: torch.Tensor, group: Group, packed: bool) -> torch.Tensor:
        z = z.float()
        z -= _reduce(z.max(-1).values, MAX, group)[:, None]
        column, here = _place(targets, z.shape[1], group)
        rows = torch.arange(len(z), device=z.device)
        target = z[rows, column] * here
        total = torch.exp(z, out=z).sum(-1)
        if packed:
            target, total = _reduce(torch.stack([target, total]), SUM, group)
        else:
            target, total = _reduce(target, SUM, group), _reduce(total, SUM, group)
        ctx.save_for_backward(z.div_(total[:, None]), rows, column, here)
        return target - total.log()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        softmax, rows, column, here = ctx.saved_tensors
        softmax[rows, column] -= here.float()
        return softmax.mul_(-grad[:, None]), None, None, None


class _Entropy(torch.autograd.Function):
    """Keeps the logits and their softmax for backward."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, group: Group) -> torch.Tensor:
        maximum = _reduce(z.max(-1, keepdim=True).values, MAX, group)
        softmax = (z - maximum).exp_()
        total = _reduce(softmax.sum(-1, keepdim=True), SUM, group)
        softmax.div_(total)
        # They compile this into one kernel; a few rows at a time likewise keep no product of full size.
        parts = [(p * rows).sum(-1, keepdim=True) for p, rows in zip(softmax.split(8), z.split(8), strict=True)]
        mean = _reduce(torch.cat(parts), SUM, group)
        ctx.save_for_backward(z, softmax, mean)
        return (maximum + total.log() - mean)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        z, softmax, mean = ctx.saved_tensors
        z.sub_(mean)
        softmax.mul_(z).mul_(-grad[:, None])
        z.add_(mean)
        return softmax, None


def _log_softmax(z: torch.Tensor, group: Group) -> torch.Tensor:
    z = z - _reduce(z.amax(-1, keepdim=True), MAX, group)
    return z.sub_(_reduce(z.exp().sum(-1, keepdim=True), SUM, group).log_())


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, targets: torch.Tensor, group: Group) -> torch.Tensor:
        column, here = _place(targets, z.shape[1], group)
        parts = []
        for start in range(0, len(z), CHUNK):
            rows = slice(start, start + CHUNK)
            parts.append(_log_softmax(z[rows].float(), group).gather(1, column[rows, None])[:, 0] * here[rows])
        ctx.save_for_backward(z, column, here)
        ctx.group = group
        return _reduce(torch.cat(parts), SUM, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        z, column, here = ctx.saved_tensors
        out = torch.zeros_like(z)
        for start in range(0, len(z), CHUNK):
            rows = slice(start, start + CHUNK)
            softmax = _log_softmax(z[rows].float(), ctx.group).exp()
            chosen = here[rows, None] * torch.nn.functional.one_hot(column[rows], z.shape[1])
            out[rows] = chosen.float().sub_(softmax).mul_(grad[rows, None])
        return out, None, None


class _ChunkedEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, group: Group) -> torch.Tensor:
        parts = []
        for chunk in z.split(CHUNK):
            log_p = _log_softmax(chunk.float(), group)
            parts.append(-_reduce((log_p.exp() * log_p).sum(-1), SUM, group))
        ctx.save_for_backward(z)
        ctx.group = group
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        out = torch.zeros_like(z)
        for start in range(0, len(z), CHUNK):
            rows = slice(start, start + CHUNK)
            log_p = _log_softmax(z[rows].float(), ctx.group)
            p = log_p.exp()
            entropy = -_reduce((p * log_p).sum(-1, keepdim=True), SUM, ctx.group)
            out[rows] = p.mul_(log_p + entropy).mul_(-grad[rows, None])
        return out, None


class _ChunkedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        log_probs, entropy = [], []
        for h, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            z = (h @ weight.t()).float()
            p, log_p = z.softmax(-1), z.log_softmax(-1)
            log_probs.append(log_p.gather(-1, target[:, None])[:, 0])
            entropy.append(z.logsumexp(-1) - (p * z).sum(-1))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.set_materialize_grads(False)
        return torch.cat(log_probs), torch.cat(entropy)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, up: torch.Tensor, up_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            z = (hidden[rows] @ weight.t()).float()
            p = z.softmax(-1)
            slope = torch.zeros_like(z).scatter_(-1, targets[rows, None], 1)
            slope = up[rows, None] * (slope - p)
            if up_entropy is not None:
                entropy = z.logsumexp(-1) - (p * z).sum(-1)
                slope += p * (z.log_softmax(-1) + entropy[:, None]) * -up_entropy[rows, None]
            slope = slope.to(hidden.dtype)
            grad_hidden[rows] += slope @ weight
            grad_weight += slope.t() @ hidden[rows]
        return grad_hidden, grad_weight, None
