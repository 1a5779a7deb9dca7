"""FP8 weights as they travel and lie in Hugging Face folders: codes, scales, names, and how to read them.

As in DeepSeek-V3's checkpoints and SGLang's loader: a matrix is ``float8_e4m3fn`` codes and float32 scales, ``code * scale`` being its
value. One scale for each 128x128 block (``*.weight_scale_inv``, arXiv 2412.19437, section 3.3.2; "inv" because it is what undoes the
scaling), or one for the whole tensor (``*.weight_scale``). Blocks are counted from the first row and column; the last may be smaller.
Who writes them is ``megatron_ext.weights.fp8``. Pure torch: CPU and CUDA give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline import blocks
from pipeline.blocks import Block

BLOCK: Block = (128, 128)
CODES = torch.float8_e4m3fn


def quantization_config(block: Block | None = BLOCK) -> dict[str, Any]:
    """The ``quantization_config`` that ``config.json`` must hold for SGLang and transformers to read the tensors as FP8.

    Activations are scaled as they come: a static scheme needs scales from calibration, which training does not have.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if block is None else list(block),
    }


def scale_name(name: str, block: Block | None = BLOCK) -> str:
    """Hugging Face name of the scale of the tensor ``name``, which ends in ``.weight``."""
    return name + ("_scale" if block is None else "_scale_inv")


def scale_shape(shape: tuple[int, ...], block: Block | None = BLOCK) -> tuple[int, ...]:
    """Shape of the scale of a tensor of ``shape``: ``[ceil(rows / 128), ceil(columns / 128)]``, or ``[]`` for one per tensor."""
    return blocks.count(shape, block)


def dequantise(
    codes: torch.Tensor, scale: torch.Tensor, block: Block | None = BLOCK, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``code * scale``, computed in float32 and rounded to ``dtype``. Raises ``ValueError`` where the scale has another shape."""
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
    """Every tensor under its own name, codes in blocks as the float32 values that they stand for. Raises like ``without_scales``."""
    return {
        name: dequantise(tensor, tensors[scale_name(name)]) if tensor.dtype == CODES else tensor
        for name, tensor in without_scales(tensors).items()
    }
