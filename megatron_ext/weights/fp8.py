"""Linear weights into the FP8 codes and scales of ``pipeline.fp8``: one quantiser for export, weight sync and tests.

Training rounds by Transformer Engine's rules instead (``megatron_ext.fp8.quantise``).

Blocks are counted from a tensor's first row and column. So a shard whose edges lie on block edges may be quantised where it is, before
it is sent at a half of the bytes; any other is quantised after it was gathered. :func:`aligned` says which, from the layout alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

import pipeline.blocks as blocks
from megatron_ext.weights.layout import Row
from pipeline.blocks import Block
from pipeline.fp8 import BLOCK, CODES, dequantise, quantization_config, scale_name, scale_shape

__all__ = (  # the format's names too: who writes needs no second import
    "BLOCK",
    "CODES",
    "Block",
    "aligned",
    "dequantise",
    "largest",
    "quantise",
    "quantise_tensors",
    "quantised",
    "quantised_names",
    "quantization_config",
    "scale_name",
    "scale_shape",
)

_LARGEST = 448.0  # of e4m3fn
# The smallest normal float32. Blocks of zeros get it, and those so small that amax / 448 has lost bits: a scale of 0 would give NaN, a
# scale of 1 would win over its neighbours' where SGLang joins per-tensor scales of q, k and v by their maximum.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_SOURCES = (torch.bfloat16, torch.float16, torch.float32)


def quantised(row: Row) -> bool:
    """Whether a row's tensors go out in FP8: the matrices of attention, feed-forward and experts.

    Embeddings, output layer, norms, biases and the router keep their type, as in DeepSeek-V3's and Qwen3's FP8 checkpoints.
    """
    return row.layer is not None and len(row.sources[0].shape) == 2 and not row.parameter.endswith("router.weight")


def quantised_names(rows: Iterable[Row]) -> frozenset[str]:
    """Hugging Face names of the tensors that go out in FP8."""
    return frozenset(source.name for row in rows if quantised(row) for source in row.sources)


def aligned(row: Row, tp: int, block: Block | None = BLOCK) -> bool:
    """Whether every one of ``tp`` ranks (for an expert, of ``etp``) may quantise its own shard before it is sent.

    True: codes and scales of the shards, put together, are bitwise those of the whole tensors (with one scale per tensor, given
    an ``amax`` reduced over the shards). False: gather first.
    """
    if block is None or row.split is None:
        return True
    return all(start % block[row.dim] == 0 for rank in range(tp) for start in _starts(row, tp, rank))


def _starts(row: Row, tp: int, rank: int) -> Iterable[int]:
    """Where the rank's part of each source begins; it ends where another rank's begins, or at the tensor's edge."""
    starts: dict[int, int] = {}
    for piece in row.slices(tp, rank):
        starts.setdefault(piece.source, piece.source_start)
    return starts.values()


def quantise(
    weight: torch.Tensor, block: Block | None = BLOCK, amax: torch.Tensor | None = None, name: str = "the tensor"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (shape of ``weight``) and float32 scale (:func:`scale_shape`) of a matrix in bf16, fp16 or float32.

    ``scale = amax / 448`` and ``code = weight / scale``, both rounded to nearest even, so the largest entry of each block gets the
    largest code. ``code * scale`` differs from ``weight`` by at most ``max(2**-4 * |weight|, 2**-10 * scale)``, that is by at most
    ``amax / 28`` (half the distance of the two largest codes); no code is NaN.

    ``amax`` is for a shard of a tensor with one scale (``block=None``): its largest magnitude over all shards, see
    :func:`largest`. ``name`` is for errors: ``ValueError`` for a NaN or infinite entry, another shape or another type.
    """
    if weight.ndim != 2 or weight.dtype not in _SOURCES or 0 in weight.shape:
        raise ValueError(
            f"{name} is {weight.dtype} of shape {list(weight.shape)}: only matrices in bf16, fp16 or fp32 become FP8"
        )
    if amax is not None and block is not None:
        raise ValueError(f"{name}: amax is for one scale per tensor (block=None); blocks have their own")
    found = blocks.largest(weight, block)
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"{name} holds NaN or infinite entries: FP8 cannot hold them; look at the step that wrote them"
        )
    if amax is not None and bool(amax < found):
        raise ValueError(
            f"{name}: amax={amax.item():g} is below the largest entry {found.item():g}: reduce it over all shards"
        )
    scale = _scale(found if amax is None else amax)
    codes = torch.empty(weight.shape, dtype=CODES, device=weight.device)
    for source, target, divisor in blocks.bands(weight, codes, scale, block):
        # No clamp: |source| <= amax and scale >= amax / 448 * (1 - 2**-24), and below 464 every torch rounds to 448.
        target.copy_(source.to(torch.float32, copy=True).div_(divisor))
    return codes, scale


def largest(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of a tensor, float32 of shape ``[]``; NaN where an entry is. Reduce it over shards with a maximum."""
    return blocks.largest(weight, None)


def quantise_tensors(
    tensors: Mapping[str, torch.Tensor],
    names: Collection[str],
    block: Block | None = BLOCK,
    amax: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Tensors by Hugging Face name, those in ``names`` (:func:`quantised_names`) replaced by codes, each followed by its scale.

    ``amax`` by name, where ``tensors`` are shards and ``block`` is ``None``. Errors are those of :func:`quantise`.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in names:
            codes, scale = quantise(tensor, block, amax[name] if amax is not None else None, name)
            found |= {name: codes, scale_name(name, block): scale}
        else:
            found[name] = tensor
    return found


def _scale(amax: torch.Tensor) -> torch.Tensor:
    # By a tensor, not a number: CUDA divides by a number as multiplication with its rounded reciprocal, CPU does not.
    return (amax.float() / torch.full_like(amax, _LARGEST, dtype=torch.float32)).clamp_(min=_SMALLEST_SCALE)
