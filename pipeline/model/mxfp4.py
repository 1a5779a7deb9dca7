"""Reads MXFP4 codes as gpt-oss's folders hold them: ``*_blocks`` and ``*_scales`` in place of a tensor.

Along a matrix's input, 32 entries share a power of two (OCP Microscaling Formats 1.0: E2M1 codes, E8M0 scales). Of an
input of ``n`` entries, ``blocks`` are ``[..., n / 32, 16]`` bytes of two codes each, the lower four bits first, and
``scales`` ``[..., n / 32]`` exponents, 127 above their value. The same numbers as transformers 5.12
(``integrations/mxfp4.py``). Pure torch.
"""

from __future__ import annotations

import torch

GROUP = 32  # entries that share a scale
BLOCKS, SCALES = "_blocks", "_scales"  # what the names of both end in
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; the fourth is the sign
_BIAS = 127


def dequantise(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Bfloat16 ``[..., n]`` of uint8 ``blocks`` ``[..., n / 32, 16]`` and ``scales`` ``[..., n / 32]``."""
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)]).bfloat16()
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    factors = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - _BIAS).bfloat16()
    return (table[codes.int()] * factors[..., None]).flatten(-2)
