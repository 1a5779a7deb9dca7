"""Transformer Engine's quantisers in torch: one rounding rule per recipe, bit for bit as its CUDA kernels (2.20) round.

A matrix ``x`` becomes FP8 codes and the factors that undo the scaling: ``code * scale_inv``. Every rule multiplies by a
``scale`` in float32, clamps at the largest code and rounds to nearest even; they differ in who shares a scale and how
it is found.

=========== ======================================== ==============================================
recipe      one scale for                            scale
=========== ======================================== ==============================================
delayed     the tensor                               ``largest code / amax`` of earlier passes
tensorwise  the tensor                               ``largest code / amax`` of this tensor
blockwise   1 x 128 (x, grad), 128 x 128 (w) blocks  the same, rounded down to a power of two
mxfp8       1 x 32 entries                           ``2**-e``, ``2**e >= amax / largest code`` (E8M0)
=========== ======================================== ==============================================

``amax`` takes no notice of NaN, as the kernels' ``fmaxf`` does not; a NaN entry stays NaN. An infinite entry becomes
the largest code.

Sources: TransformerEngine, ``common/recipe/{recipe_common.cuh,delayed_scaling.cu}``,
``common/transpose/quantize_transpose_{square,vector}_blockwise.cu``, ``common/cast/mxfp8/quantize_mxfp8.cuh``,
``common/util/ptx_arch_spec.cuh``; OCP Microscaling Formats (MX) 1.0, section 6.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import pipeline.model.blocks as blocks
from pipeline.model.blocks import Block
from pipeline.units import FP8_BLOCK

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIDE, MX_SIDE = FP8_BLOCK, 32  # entries that share a scale: blockwise, mxfp8
_EXPONENT_BITS = -0x00800000  # sign and exponent of a float32; positive numbers here
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Quantised:
    """A matrix in FP8: ``codes`` ``[rows, columns]`` (e4m3 or e5m2) and float32 ``scale_inv``, of shape
    ``scale_shape``.
    """

    codes: torch.Tensor
    scale_inv: torch.Tensor
    block: Block | None

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``code * scale_inv``, computed in float32 and rounded to ``dtype``."""
        return blocks.multiply(self.codes, self.scale_inv, self.block, dtype)


def tensorwise(x: torch.Tensor, dtype: torch.dtype) -> Quantised:
    """Current scaling: one scale per tensor, from its own largest magnitude."""
    return _quantised(x, dtype, scale_of(amax_of(x, None), dtype), None)


def blockwise(x: torch.Tensor, dtype: torch.dtype, block: Block) -> Quantised:
    """One scale, a power of two, for each block: ``(1, 128)``, ``(128, 1)`` or ``(128, 128)``."""
    scale = scale_of(amax_of(x, block), dtype, overflow=torch.finfo(x.dtype).max)
    return _quantised(x, dtype, (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32), block)


def mxfp8(x: torch.Tensor, dtype: torch.dtype, block: Block) -> Quantised:
    """One power of two for each 32 entries: ``block`` is ``(1, 32)`` or ``(32, 1)``."""
    exponents = e8m0_of(amax_of(x, block), dtype)
    codes = _encode(x, dtype, _power_of_two(254 - exponents), block)
    return Quantised(codes, _power_of_two(exponents), block)


class Delayed:
    """Delayed scaling of one tensor: the scale of this pass comes from the largest magnitudes of earlier ones.

    ``history`` (float32 ``[length]``) and ``scale`` (float32 ``[]``) are the state, changed in place; ``history[0]`` is
    the pass in progress. The scale starts at 1, so that the first pass saturates at the largest code.
    """

    def __init__(
        self, history: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, margin: int = 0, algorithm: str = "max"
    ) -> None:
        """``margin``: powers of two left unused; ``algorithm``: ``max`` | ``most_recent`` of the history."""
        self.history, self.scale = history, scale
        self._dtype, self._algorithm = dtype, algorithm
        self._largest = torch.finfo(dtype).max * 2.0**-margin

    def quantise(self, x: torch.Tensor) -> Quantised:
        """Round ``x`` by the scale in force, and note its largest magnitude."""
        self.history[0] = torch.maximum(self.history[0], amax_of(x, None))
        return _quantised(x, self._dtype, self.scale, None)

    def update(self) -> None:
        """End of a pass: ``history[0]``, by now the largest over all ranks, joins the history and the scale is made
        anew.

        A pass that met only zeros leaves both as they are; a largest magnitude that is not finite leaves the scale.
        """
        latest = self.history[0].clone()
        if not latest:
            return
        self.history.copy_(self.history.roll(-1))  # the latest goes last
        amax = self.history.max() if self._algorithm == "max" else latest
        self.history[0] = 0
        if amax.isfinite():
            self.scale.copy_((torch.full_like(amax, self._largest) / amax).clamp_(max=_FLOAT32_MAX))


def amax_of(x: torch.Tensor, block: Block | None) -> torch.Tensor:
    """Largest magnitude of each block, float32; NaN entries count for nothing."""
    found = blocks.largest(x, block)
    if bool(found.isnan().any()):
        found = blocks.largest(x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), block)
    return found


def scale_of(amax: torch.Tensor, dtype: torch.dtype, overflow: float = _FLOAT32_MAX) -> torch.Tensor:
    """``largest code / amax``; 1 where ``amax`` is 0 or not finite, ``overflow`` where the quotient is too large for
    float32.
    """
    # By a tensor, not a number: CUDA divides a number as multiplication with a rounded reciprocal, CPU does not.
    scale = torch.full_like(amax, torch.finfo(dtype).max) / amax
    scale = torch.where(scale.isinf(), overflow, scale)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)


def e8m0_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Biased exponent ``e`` (int32, 0 to 254) of the smallest power of two, ``2**(e - 127)``, at or above ``amax /
    largest code``.
    """
    bits = (amax * torch.full_like(amax, 1 / torch.finfo(dtype).max)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x007FFFFF
    # 2**-127, the least there is, holds all of the lower half of the subnormal numbers.
    above = (mantissa > 0) & ((exponent > 0) | (mantissa > 0x00400000))
    return (exponent + above).clamp_(max=254)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """``2**(exponent - 127)``, exact; 2**-127 is subnormal."""
    return torch.where(exponent == 0, 0x00400000, exponent << 23).view(torch.float32)


def _quantised(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, block: Block | None) -> Quantised:
    return Quantised(_encode(x, dtype, scale, block), scale.reciprocal(), block)


def _encode(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, block: Block | None) -> torch.Tensor:
    """``x * scale`` in float32, clamped and rounded to nearest even."""
    codes, limit = torch.empty(x.shape, dtype=dtype, device=x.device), torch.finfo(dtype).max
    for source, target, factor in blocks.bands(x, codes, scale, block):
        # Casting to FP8 does not saturate in torch; the clamp keeps NaN.
        target.copy_(source.to(torch.float32, copy=True).mul_(factor).clamp_(-limit, limit))
    return codes
