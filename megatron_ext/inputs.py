"""What the model is given for the rows of a micro-batch: a grid padded on the right, or one packed sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

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

    def to(self, device: torch.device) -> ModelInputs:
        """The same on ``device``."""
        packed = self.packed
        if packed is not None:
            ends = packed.cu_seqlens_q.to(device)
            packed = replace(packed, cu_seqlens_q=ends, cu_seqlens_kv=ends)
        names = ("tokens", "labels", "targets", "routes")
        grids = {name: grid.to(device) for name in names if (grid := getattr(self, name)) is not None}
        return replace(self, **grids, packed=packed)


def alignment(config: TransformerConfig) -> int:
    """What every sequence's length must be a multiple of: it is cut over context and sequence parallel ranks."""
    cp = config.context_parallel_size
    per_cp_rank = lcm(
        2 if cp > 1 else 1,  # a rank has a piece from the front and one from the back
        config.tensor_model_parallel_size if config.sequence_parallel else 1,
        FP8_ALIGNMENT if config.fp8 else 1,
    )
    return cp * per_cp_rank


def build(micro: TrainBatch, *, packing: bool, align: int = 1) -> ModelInputs:
    """The inputs of ``micro`` (on CPU), sequences padded to a multiple of ``align``; a grid is as wide as its longest
    row.
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
    if packing:
        grids = [grid[None] for grid in grids]
    else:
        inside = torch.arange(int(micro.lengths.max()) - 1) < micro.lengths[:, None] - 1
        grids = [_placed(grid, inside) for grid in grids]
    padding = -grids[0].shape[1] % align
    tokens, labels, targets, filled, *routes = (F.pad(grid, (0, 0) * (grid.dim() - 2) + (0, padding)) for grid in grids)
    packed = None
    if packing:
        rest = [padding] if padding else []  # a row of its own, which no other sees
        packed = packed_rows((micro.lengths - 1).tolist() + rest)
    return ModelInputs(tokens, labels, targets, filled, real, packed, *routes)


def _placed(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """``values`` ``[n, ...]`` where ``inside`` (bool ``[rows, seq]``) is True, row-major; 0 elsewhere."""
    grid = values.new_zeros(*inside.shape, *values.shape[1:])
    grid[inside] = values
    return grid


def packed_rows(lengths: list[int], device: torch.device | None = None) -> PackedSeqParams:
    """Rows of these lengths one after the other: attention stays within each, and positions start again at 0."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
