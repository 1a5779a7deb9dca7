"""What the model is given for the rows of a micro-batch: a grid padded on the right, or one packed sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

from megatron_ext import context_parallel
from pipeline.types import TrainBatch

FP8_ALIGNMENT = 32  # tokens of an FP8 matrix product: 16 for cuBLAS, 32 for a block of MXFP8


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch as the model sees it. A row's last token predicts nothing and is left out."""

    tokens: torch.Tensor  # int64 [rows, seq], or [1, n] packed
    labels: torch.Tensor  # int64, as ``tokens``: the next token of each
    targets: torch.Tensor  # bool, as ``tokens``: True where the next token is a target; row-major order is the batch's
    filled: torch.Tensor  # bool, as ``tokens``: True where it is no padding; on the CPU, for few models need it
    real: int  # tokens that are not padding
    packed: PackedSeqParams | None = None  # where each row begins and ends; None: one row of the grid each
    routes: torch.Tensor | None = None  # as ``tokens``, x [expert layers, top_k]: experts to replay; 0 on padding
    own: torch.Tensor | None = None  # int64 [n]: columns of ``tokens`` that this rank of a CP group computes; None: all

    def to(self, device: torch.device) -> ModelInputs:
        """The same on ``device``."""
        packed = self.packed
        if packed is not None:
            ends = packed.cu_seqlens_q.to(device)
            packed = replace(packed, **_ends(ends))
        names = ("tokens", "labels", "targets", "routes", "own")
        grids = {name: grid.to(device) for name in names if (grid := getattr(self, name)) is not None}
        return replace(self, **grids, packed=packed)


def alignment(config: TransformerConfig) -> int:
    """What every sequence's length must be a multiple of: it is cut over context and sequence parallel ranks."""
    cp = config.context_parallel_size
    return lcm(
        context_parallel.multiple(cp),
        cp * (config.tensor_model_parallel_size if config.sequence_parallel else 1),
        cp * (FP8_ALIGNMENT if config.fp8 else 1),
    )


def build(micro: TrainBatch, *, packing: bool, align: int = 1, cp: tuple[int, int] = (0, 1)) -> ModelInputs:
    """The inputs of ``micro`` (on CPU) for rank ``cp[0]`` of the ``cp[1]`` that share its rows.

    Sequences are padded to a multiple of ``align``; a grid is as wide as its longest row, and of a packed sequence each
    row is padded to a multiple of its chunks.
    """
    ends = micro.lengths.cumsum(0)
    inner = torch.ones(len(micro.tokens), dtype=torch.bool)
    inner[ends - 1] = False  # a row's last token is no input,
    following = inner.roll(1)  # and its first no label
    grids = [micro.tokens[inner].long(), micro.tokens[following].long(), micro.loss_mask[following]]
    grids.append(torch.ones_like(grids[-1]))
    if micro.routes is not None:
        grids.append(micro.routes[inner].short())  # torch computes little with uint16
    real = len(grids[0])
    lengths, chunks = micro.lengths - 1, context_parallel.multiple(cp[1])
    widths = (lengths + chunks - 1) // chunks * chunks
    if packing:
        place = torch.arange(int(widths.sum())) - (widths.cumsum(0) - widths).repeat_interleave(widths)
        inside = (place < lengths.repeat_interleave(widths))[None]
    else:
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
    grids = [_placed(grid, inside) for grid in grids]
    padding = -grids[0].shape[1] % align
    tokens, labels, targets, filled, *routes = (F.pad(grid, (0, 0) * (grid.dim() - 2) + (0, padding)) for grid in grids)
    rows = [tokens.shape[1]]
    if packing:
        rows = widths.tolist() + ([padding] if padding else [])  # a row of its own, which no other sees
    packed, own = packed_rows(rows) if packing else None, context_parallel.columns(rows, *cp)
    return ModelInputs(tokens, labels, targets, filled, real, packed, routes[0] if routes else None, own)


def _placed(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """``values`` ``[n, ...]`` where ``inside`` (bool ``[rows, seq]``) is True, row-major; 0 elsewhere."""
    grid = values.new_zeros(*inside.shape, *values.shape[1:])
    grid[inside] = values
    return grid


def packed_rows(lengths: list[int], device: torch.device | None = None) -> PackedSeqParams:
    """Rows of these lengths one after the other: attention stays within each, and positions start again at 0."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedSeqParams(qkv_format="thd", max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths), **_ends(ends))


def _ends(ends: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where rows end, of queries and keys, with padding and without: a row's padding counts as its own, and no token of
    the row sees it.

    Transformer Engine asks for both under context parallelism, and finds by their identity that there is nothing
    between rows (2.20, ``dot_product_attention.py``), which its flash attention needs.
    """
    return dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"), ends)
