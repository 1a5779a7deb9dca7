"""Blocks of logits in torch, on any device: the kernel of ``logprobs`` where Triton does not run.

Rows are worked on a few at a time so that temporaries stay in cache. Exponentials are base 2: on CPU ``exp2`` takes a
third of the time of ``exp`` (torch's own vector code instead of MKL's).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

# Stands for -inf where a product with probability 0 must give 0, not NaN; finite after division by any usable T.
FLOOR = -1e30
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
# Logits worked on at a time. CPU: 1 MiB per float32 temporary (1.7 times faster than 64 MiB). Elsewhere 64 MiB.
_CHUNK_LOGITS_CPU = 1 << 18
_CHUNK_LOGITS = 1 << 24


def accumulate(
    logits: torch.Tensor,
    column: torch.Tensor,
    maximum: torch.Tensor,
    sums: torch.Tensor,
    inverse_temperature: torch.Tensor | None,
) -> None:
    """Add a block of logits to each token's maximum and sums, in place.

    Args:
        logits: float32 or bfloat16 ``[n, b]``, b > 0; not changed. column: int64 ``[n]``, the target's column in this
        block; outside ``[0, b)`` where it is not in it. maximum: float32 ``[n]``, of the logits so far; at least
        ``FLOOR``, which stands for no finite logit. sums: float32 ``[4, n]``: e^x, x e^x and e^(x/T) over the logits so
        far, x relative to ``maximum``; the target's logit.
            With ``[6, n]`` also e^2x and x e^2x.
        inverse_temperature: float32 ``[n]``, 1/T; ``None``: the third sum is left alone.
    """
    index, here = _place(column, logits)
    sums[3] += torch.where(here, logits.gather(1, index)[:, 0].float(), 0.0)
    own_maximum, own = torch.empty_like(maximum), torch.zeros_like(sums)
    moment = len(sums) > 4
    for rows, y, exp, *squares in _chunks(logits, 3 if moment else 2):
        block = logits[rows] if logits.dtype == torch.float32 else y.copy_(logits[rows])
        highest = torch.amax(block, -1, out=own_maximum[rows]).clamp_(min=FLOOR)
        torch.sub(block, highest[:, None], out=y).clamp_(min=FLOOR).mul_(LOG2_E)  # x in units of ln 2
        torch.sum(torch.exp2(y, out=exp), -1, out=own[0, rows])
        if moment:
            torch.sum(torch.square(exp, out=squares[0]), -1, out=own[4, rows])
            torch.sum(squares[0].mul_(y), -1, out=own[5, rows])
        torch.sum(exp.mul_(y), -1, out=own[1, rows])
        if inverse_temperature is not None:
            torch.sum(y.mul_(inverse_temperature[rows, None]).exp2_(), -1, out=own[2, rows])
    own[1::4] *= LN_2
    both = torch.maximum(maximum, own_maximum)
    rescale_(sums, maximum - both, inverse_temperature)
    rescale_(own, own_maximum - both, inverse_temperature)
    sums += own
    maximum.copy_(both)


def gradient_(
    logits: torch.Tensor,
    column: torch.Tensor,
    maximum: torch.Tensor,
    log_total: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> None:
    """Overwrite a block of logits ``[n, b]``, b > 0, with the gradient of the loss with respect to it.

    ``maximum``, ``log_total`` (log of the sum of e^x) and ``entropy`` are those of the whole vocabulary,
    ``grad_log_probs`` and ``grad_entropy`` what comes from above; float32 ``[n]`` each. ``column`` as in
    ``accumulate``.
    """
    offset = log_total.mul(-LOG2_E)
    constant, factor = grad_log_probs.neg(), None
    if grad_entropy is not None:
        constant = constant.addcmul(grad_entropy, entropy, value=-1)
        factor = grad_entropy.mul(-LN_2)

    def slopes(z: torch.Tensor, p: torch.Tensor, rows: slice) -> torch.Tensor:
        """Overwrite float32 logits with -p (up + grad_entropy (log p + H)); ``p`` is space to work in."""
        y = torch.add(offset[rows, None], z.sub_(maximum[rows, None]), alpha=LOG2_E, out=z)  # log p in units of ln 2
        if factor is None:
            return y.exp2_().mul_(constant[rows, None])
        torch.exp2(y, out=p)
        return y.clamp_(min=FLOOR).mul_(factor[rows, None]).add_(constant[rows, None]).mul_(p)

    index, here = _place(column, logits)
    at_target = logits.gather(1, index).float()
    at_target = slopes(at_target, torch.empty_like(at_target), slice(None)).add_(grad_log_probs[:, None])
    for rows, space, p in _chunks(logits, 2):
        if logits.dtype == torch.float32:
            slopes(logits[rows], p, rows)
        else:
            logits[rows] = slopes(space.copy_(logits[rows]), p, rows)
    at_target = torch.where(here[:, None], at_target.to(logits.dtype), logits.gather(1, index))[:, 0]
    # Not scatter_, which on CPU makes a float32 copy of all of a bf16 block.
    logits.index_put_((torch.arange(len(index), device=index.device), index[:, 0]), at_target)


def rescale_(sums: torch.Tensor, shift: torch.Tensor, inverse_temperature: torch.Tensor | None) -> None:
    """Take ``sums`` ``[4 or 6, n]`` from one maximum to another that lies ``-shift`` higher (finite, at most 0), in
    place.
    """
    scale = shift.exp()
    sums[1] = scale * (sums[1] + shift * sums[0])
    sums[0] *= scale
    if inverse_temperature is not None:
        sums[2] *= (shift * inverse_temperature).exp()
    if len(sums) > 4:
        sums[5] = scale.square() * (sums[5] + shift * sums[4])
        sums[4] *= scale.square()


def _chunks(logits: torch.Tensor, spaces: int) -> Iterator[tuple[Any, ...]]:
    """Slices of rows, each with ``spaces`` float32 tensors to work in: the same memory every time, which stays in
    cache.
    """
    rows, width = logits.shape
    most = _CHUNK_LOGITS_CPU if logits.device.type == "cpu" else _CHUNK_LOGITS
    step = min(rows, max(1, most // width))
    space = logits.new_empty((spaces, step, width), dtype=torch.float32)
    for start in range(0, rows, max(1, step)):
        end = min(rows, start + step)
        yield slice(start, end), *space[:, : end - start]


def _place(column: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An index ``[rows, 1]`` that is valid for every row, and whether it is the target's."""
    width = block.shape[1]
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)
