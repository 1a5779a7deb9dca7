"""Blocks of logits in Triton, on CUDA: each logit is read once in forward, read and written once in backward.

The same two functions as ``logprobs_torch``, whose arguments they share. Not yet run on a GPU: the arithmetic is tested
in Triton's interpreter, and the kernels compile for sm_90 (tests/gpu, tests/unit).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FLOOR = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_MOST_COLUMNS = 2048  # of a row, read at a time: 8 per thread, 16 bytes in bf16, in under 50 registers
_WARPS = 8


def accumulate(
    logits: torch.Tensor,
    column: torch.Tensor,
    maximum: torch.Tensor,
    sums: torch.Tensor,
    inverse_temperature: torch.Tensor | None,
) -> None:
    """See ``logprobs_torch.accumulate``."""
    tokens, width = _check(logits)
    if not tokens:
        return
    tempered, moment = inverse_temperature is not None, len(sums) > 4
    with torch.cuda.device_of(logits):
        _accumulate[(tokens,)](
            logits,
            column.contiguous(),
            maximum,
            sums,
            inverse_temperature if tempered else maximum,  # not read
            sums.stride(0),
            width,
            logits.stride(0),
            TEMPERED=tempered,
            MOMENT=moment,
            BLOCK=min(_MOST_COLUMNS, triton.next_power_of_2(width)),
            num_warps=_WARPS,
        )


def gradient_(
    logits: torch.Tensor,
    column: torch.Tensor,
    maximum: torch.Tensor,
    log_total: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> None:
    """See ``logprobs_torch.gradient_``."""
    tokens, width = _check(logits)
    if not tokens:
        return
    block = min(_MOST_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(logits):
        _gradient[(tokens, triton.cdiv(width, block))](
            logits,
            column.contiguous(),
            maximum,
            log_total,
            entropy,
            grad_log_probs.contiguous(),
            grad_log_probs if grad_entropy is None else grad_entropy.contiguous(),  # not read if None
            width,
            logits.stride(0),
            ENTROPY=grad_entropy is not None,
            BLOCK=block,
            num_warps=_WARPS,
        )


def _check(logits: torch.Tensor) -> tuple[int, int]:
    """Tokens and columns; refuses what the kernels cannot address."""
    if not logits.is_cuda and isinstance(_accumulate, triton.runtime.JITFunction):  # else interpreted
        raise ValueError(f"kernel='triton' needs a CUDA device, the logits are on {logits.device}: choose torch")
    if logits.stride(1) != 1:
        raise ValueError(f"the logits of a token must lie side by side; their stride is {logits.stride(1)}")
    return logits.shape[0], logits.shape[1]


@triton.jit
def _accumulate(
    logits,
    column,
    maximum,
    sums,
    inverse_temperature,
    sum_stride,
    width,
    stride,
    TEMPERED: tl.constexpr,  # noqa: N803
    MOMENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program per token. Every lane keeps sums of its own, relative to the running maximum of the row."""
    row = tl.program_id(0)
    z_row = logits + row.to(tl.int64) * stride
    before = tl.load(maximum + row)
    inverse = tl.load(inverse_temperature + row) if TEMPERED else 1.0
    high = before
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)  # y 2^y, with y = x / ln 2
    tempered = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)  # 4^y
    weighted_squares = tl.zeros([BLOCK], tl.float32)  # y 4^y
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(high, tl.max(z, 0))
        if higher > high:  # seldom after the first few blocks
            shift = (high - higher) * _LOG2_E
            weighted = (weighted + shift * total) * tl.exp2(shift)
            total *= tl.exp2(shift)
            if TEMPERED:
                tempered *= tl.exp2(shift * inverse)
            if MOMENT:
                weighted_squares = (weighted_squares + shift * squares) * tl.exp2(2 * shift)
                squares *= tl.exp2(2 * shift)
            high = higher
        y = tl.maximum((z - high) * _LOG2_E, _FLOOR, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(y)
        weighted += e * y
        total += e
        if TEMPERED:
            tempered += tl.exp2(y * inverse)
        if MOMENT:
            squares += e * e
            weighted_squares += e * e * y
    shift = before - high
    scale = tl.exp2(shift * _LOG2_E)
    old = tl.load(sums + row)
    old_weighted = tl.load(sums + sum_stride + row)
    tl.store(maximum + row, high)
    tl.store(sums + row, scale * old + tl.sum(total, 0))
    tl.store(sums + sum_stride + row, scale * (old_weighted + shift * old) + _LN_2 * tl.sum(weighted, 0))
    if TEMPERED:
        old_tempered = tl.load(sums + 2 * sum_stride + row)
        scale = tl.exp2(shift * _LOG2_E * inverse)
        tl.store(sums + 2 * sum_stride + row, scale * old_tempered + tl.sum(tempered, 0))
    if MOMENT:
        scale = tl.exp2(shift * _LOG2_E)
        old = tl.load(sums + 4 * sum_stride + row)
        old_weighted = tl.load(sums + 5 * sum_stride + row)
        tl.store(sums + 4 * sum_stride + row, scale * scale * old + tl.sum(squares, 0))
        moved = scale * scale * (old_weighted + shift * old)
        tl.store(sums + 5 * sum_stride + row, moved + _LN_2 * tl.sum(weighted_squares, 0))
    target = tl.load(column + row)
    here = (target >= 0) & (target < width)
    found = tl.load(z_row + target, mask=here, other=0.0).to(tl.float32)
    tl.store(sums + 3 * sum_stride + row, tl.load(sums + 3 * sum_stride + row) + found)


@triton.jit
def _gradient(
    logits,
    column,
    maximum,
    log_total,
    entropy,
    grad_log_probs,
    grad_entropy,
    width,
    stride,
    ENTROPY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program per token and ``BLOCK`` columns."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z_at = logits + row.to(tl.int64) * stride + at
    z = tl.load(z_at, mask=at < width, other=0.0).to(tl.float32)
    y = (z - tl.load(maximum + row) - tl.load(log_total + row)) * _LOG2_E
    up = tl.load(grad_log_probs + row)
    slope = -up
    if ENTROPY:
        finite = tl.maximum(y, _FLOOR, propagate_nan=tl.PropagateNan.ALL)
        slope -= tl.load(grad_entropy + row) * (finite * _LN_2 + tl.load(entropy + row))
    gradient = tl.exp2(y) * slope + tl.where(at == tl.load(column + row), up, 0.0)
    tl.store(z_at, gradient.to(logits.dtype.element_ty), mask=at < width)
