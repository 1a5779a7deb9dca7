"""Divides a matrix into blocks, each with one scale: the largest magnitude of each block, and scaling by block.

Blocks are counted from the first row and column; the last ones may be cut short. Pure torch: CPU and CUDA give the same
bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.model.fp8_layout import Block, scale_shape

_BAND = 1 << 21  # entries worked on at a time: bounds the float32 copy to 8 MiB, which also stays near a CPU's caches
_BAND_ROWS = 128


def largest(matrix: torch.Tensor, block: Block | None) -> torch.Tensor:
    """Largest magnitude of each block, float32 of shape ``scale_shape``.

    NaN where an entry is, 0 where there is none.
    """
    if matrix.numel() == 0:
        return torch.zeros(scale_shape(matrix.shape, block), device=matrix.device)
    if block is None:
        low, high = matrix.aminmax()
        return torch.maximum(-low, high).float().abs_()  # of zeros it may be -0
    # Over rows first, so that only one row per block need be padded.
    rows, width = matrix.shape[0] // block[0] * block[0], block[1]
    parts = [matrix[:rows].unflatten(0, (-1, block[0]))] if rows else []
    parts += [matrix[rows:].unsqueeze(0)] if rows < len(matrix) else []
    columns = torch.cat([torch.maximum(-part.amin(1), part.amax(1)) for part in parts])
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % width))
    return padded.unflatten(1, (-1, width)).amax(2).float().abs_()


def bands(
    source: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, block: Block | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Views of some block rows of ``source`` and ``target``, with their scale to broadcast.

    The views are ``[blocks, height, columns]``.
    """
    rows, columns = source.shape
    height, width = block or (_BAND_ROWS, columns)
    if source.numel() == 0:
        return
    if block is None:
        scale = scale.expand(scale_shape((rows, columns), (height, width)))
    step, whole = max(1, _BAND // (height * columns)), rows // height
    for first in range(0, whole, step):
        last = min(first + step, whole)
        band = slice(first * height, last * height)
        views = (matrix[band].unflatten(0, (-1, height)) for matrix in (source, target))
        yield (*views, _spread(scale[first:last], width, columns))
    if rows % height:
        rest = slice(whole * height, None)
        yield source[rest].unsqueeze(0), target[rest].unsqueeze(0), _spread(scale[whole:], width, columns)


def _spread(scale: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    return scale.repeat_interleave(width, 1)[:, None, :columns]


def multiply(codes: torch.Tensor, scale: torch.Tensor, block: Block | None, dtype: torch.dtype) -> torch.Tensor:
    """``code * scale``, computed in float32 and rounded to ``dtype``."""
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for source, target, factor in bands(codes, values, scale, block):
        target.copy_(source.to(torch.float32).mul_(factor))
    return values
