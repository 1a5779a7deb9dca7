"""FP8 weights as Hugging Face folders hold them: codes, scales and names, and how to write and read them.

As in DeepSeek-V3's checkpoints and SGLang's loader: a matrix is ``float8_e4m3fn`` codes and float32 scales, ``code *
scale`` being its value. One scale for each 128x128 block (``*.weight_scale_inv``, arXiv 2412.19437, section 3.3.2;
"inv" because it is what undoes the scaling). Blocks are counted from the first row and column; the last may be smaller.
``fp8_layout`` says which tensors these are, and their scales' names and shapes.

Training rounds by Transformer Engine's rules instead (``megatron_ext.fp8.quantise``). Pure torch: CPU and CUDA give the
same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from pipeline.model import blocks
from pipeline.model.fp8_layout import BLOCK, Block, scale_name, scale_shape

CODES = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3fn
# The smallest normal float32. Blocks of zeros get it, and those so small that amax / 448 has lost bits: a scale of 0
# would give NaN, a scale of 1 would win over its neighbours' where SGLang joins per-tensor scales of q, k and v by
# their maximum.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_SOURCES = (torch.bfloat16, torch.float16, torch.float32)


def quantization_config() -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json`` that makes SGLang and transformers read the tensors as FP8.

    Activations are scaled as they come: a static scheme needs scales from calibration, which training does not have.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }


def dequantise(
    codes: torch.Tensor, scale: torch.Tensor, block: Block = BLOCK, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``code * scale``, computed in float32 and rounded to ``dtype``.

    Raises ``ValueError`` where the scale has another shape.
    """
    if tuple(scale.shape) != scale_shape(codes.shape, block):
        raise ValueError(
            f"scale has shape {list(scale.shape)}; codes of shape {list(codes.shape)} in blocks {block} "
            f"need {list(scale_shape(codes.shape, block))}"
        )
    return blocks.multiply(codes, scale, block, dtype)


def without_scales(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors without the scales of those that are codes in blocks.

    Raises ``ValueError`` naming the tensor where codes have no scale, or one of another shape or type.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == CODES:
            scale = found.pop(scale_name(name), None)
            if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != scale_shape(tuple(tensor.shape)):
                lacks = "nothing" if scale is None else f"{scale.dtype} of shape {list(scale.shape)}"
                raise ValueError(
                    f"{name!r} came as FP8 codes with {lacks} for {scale_name(name)!r}; "
                    f"float32 of shape {list(scale_shape(tuple(tensor.shape)))} belongs there"
                )
    return found


def values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor under its own name, codes in blocks as the float32 values that they stand for.

    Raises like ``without_scales``.
    """
    return {
        name: dequantise(tensor, tensors[scale_name(name)]) if tensor.dtype == CODES else tensor
        for name, tensor in without_scales(tensors).items()
    }


def quantise(weight: torch.Tensor, block: Block = BLOCK, name: str = "the tensor") -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (shape of ``weight``) and float32 scale (``scale_shape``) of a matrix in bf16, fp16 or float32.

    ``scale = amax / 448`` and ``code = weight / scale``, both rounded to nearest even, so the largest entry of each
    block gets the largest code. ``code * scale`` differs from ``weight`` by at most ``max(2**-4 * |weight|, 2**-10 *
    scale)``, that is by at most ``amax / 28`` (half the distance of the two largest codes); no code is NaN.

    ``name`` is for errors: ``ValueError`` for a NaN or infinite entry, another shape or another type.
    """
    if weight.ndim != 2 or weight.dtype not in _SOURCES or 0 in weight.shape:
        raise ValueError(
            f"{name} is {weight.dtype} of shape {list(weight.shape)}: only matrices in bf16, fp16 or fp32 become FP8"
        )
    largest = blocks.largest(weight, block)
    if not bool(largest.isfinite().all()):
        raise ValueError(
            f"{name} holds NaN or infinite entries: FP8 cannot hold them; look at the step that wrote them"
        )
    scale = _scale(largest)
    codes = torch.empty(weight.shape, dtype=CODES, device=weight.device)
    for source, target, divisor in blocks.bands(weight, codes, scale, block):
        # No clamp: |source| <= amax and scale >= amax / 448 * (1 - 2**-24), and below 464 every torch rounds to 448.
        target.copy_(source.to(torch.float32, copy=True).div_(divisor))
    return codes, scale


def quantise_tensors(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    """Tensors by Hugging Face name; those in ``names`` are replaced by codes, each followed by its scale.

    Errors are those of ``quantise``.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in names:
            codes, scale = quantise(tensor, name=name)
            found |= {name: codes, scale_name(name): scale}
        else:
            found[name] = tensor
    return found


def _scale(amax: torch.Tensor) -> torch.Tensor:
    # By a tensor, not a number: CUDA divides by a number as multiplication with its rounded reciprocal, CPU does not.
    return (amax.float() / torch.full_like(amax, _LARGEST, dtype=torch.float32)).clamp_(min=_SMALLEST_SCALE)
