"""Says which weights travel in FP8, and the names and number of their scales, from the layout alone.

No tensors, no torch; ``fp8`` has the format and computes codes and scales.
"""

from __future__ import annotations

from typing import TypeAlias

from pipeline.model.layout import Row
from pipeline.units import FP8_BLOCK

Block: TypeAlias = tuple[int, int]  # rows, columns; None where it is optional: the whole matrix is one block
BLOCK: Block = (FP8_BLOCK, FP8_BLOCK)


def scale_name(name: str) -> str:
    """Hugging Face name of the scales of the tensor ``name``, which ends in ``.weight``."""
    return name + "_scale_inv"


def scale_shape(shape: tuple[int, ...], block: Block | None = BLOCK) -> tuple[int, ...]:
    """Shape of the scales of a matrix of ``shape``.

    ``[ceil(rows / height), ceil(columns / width)]``, or ``[]`` for one.
    """
    return () if block is None else (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def quantised(row: Row) -> bool:
    """Whether a row's tensors go out in FP8: the matrices of attention, feed-forward and experts.

    Embeddings, output layer, norms, biases, the router and the gate of shared experts keep their type, as in
    DeepSeek-V3's and Qwen3's FP8 checkpoints; so do the input projections of delta nets, whose gates need more than 3
    bits of mantissa.
    """
    kept = row.parameter.endswith(("router.weight", "gate_weight", "in_proj.weight"))
    return row.layer is not None and len(row.sources[0].shape) == 2 and not kept
