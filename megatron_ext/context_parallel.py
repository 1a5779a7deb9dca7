"""Context parallelism: each rank of a CP group computes two chunks of every row, the ``r``-th from the start and from
the end.

With ``cp`` ranks a row is cut into ``2 cp`` equal chunks; rank ``r`` has chunks ``r`` and ``2 cp - 1 - r``, which gives
all ranks the same share of a causal mask. Packed rows are cut one by one, so that holds of each. Megatron's rotary
embedding and Transformer Engine's attention take rows cut so (megatron-core's ``get_batch_on_this_cp_rank`` and
``get_thd_batch_on_this_cp_rank``). Without Transformer Engine, ``GatheredAttention`` is the attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from pipeline.objectives.loss import PolicyOutputs


def multiple(size: int) -> int:
    """What a row's length must be a multiple of where ``size`` ranks share it."""
    return 2 * size if size > 1 else 1


def columns(lengths: Iterable[int], rank: int, size: int) -> torch.Tensor | None:
    """What a rank computes of rows of these lengths (multiples of ``multiple``), one after the other: int64
    ``[sum of lengths / size]`` in the rank's order; None: all.

    As Transformer Engine's ``thd_get_partitioned_indices``, without a GPU.
    """
    if size == 1:
        return None
    lengths = list(lengths)
    starts = accumulate(lengths, initial=0)
    return torch.cat(
        [start + _positions(length // size, rank, size) for start, length in zip(starts, lengths, strict=False)]
    )


def shard(rows: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """This rank's ``own`` ``columns`` of ``rows`` ``[rows, seq, ...]``."""
    return rows if own is None else rows.index_select(1, own)


def own_targets(mask: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """This rank's part of ``mask`` (bool ``[rows, seq]``), with at least one target: a rank without any computes one
    for nobody.
    """
    part = shard(mask, own)
    if not part.any():
        part = part.clone()
        part[0, 0] = True
    return part


def gather(
    outputs: PolicyOutputs, mask: torch.Tensor, own: torch.Tensor | None, group: dist.ProcessGroup
) -> PolicyOutputs:
    """What all ranks of the group know of the targets of ``mask`` (bool ``[rows, seq]``), from each one's
    ``own_targets``.

    Differentiable: every rank then computes the same loss of all targets and differentiates it by its own outputs.
    """
    if own is None:
        return outputs
    place = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    local = shard(place, own)[own_targets(mask, own)]  # index of each own target
    fields = {name: value for name, value in vars(outputs).items() if value is not None}
    grid = torch.zeros(mask.numel(), len(fields), device=mask.device)
    grid = grid.index_copy(0, local, torch.stack(list(fields.values()), dim=-1))
    whole = tensor_parallel.reduce_from_tensor_model_parallel_region(grid, group=group)[mask.flatten()]
    return replace(outputs, **dict(zip(fields, whole.unbind(-1), strict=True)))


class GatheredAttention(MegatronModule):
    """Causal attention of this rank's queries over the keys and values of the whole row, gathered from the CP group.

    For where Transformer Engine, which passes keys and values around in a ring, is not at hand: exact, on any device,
    with the memory of all keys. Values may be of another width than keys (multi-head latent attention). Packed rows are
    attended to one by one, so that neither a mask nor scores are made outside of them. Windows and sinks are as
    megatron-core's attention has them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self._group, self._tp_group = pg_collection.cp, pg_collection.tp
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self._window = config.window_size[0] if windowed else None  # tokens before itself that a token sees
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // pg_collection.tp.size()
            device = torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, device=device, dtype=config.params_dtype))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """``query`` ``[seq / cp, rows, heads, width]``, ``key`` and ``value`` with key-value heads: ``[seq / cp, rows,
        heads x width]``. Packed ``[n / cp, heads, width]`` each, and the same out.
        """
        if packed_seq_params is None:
            return self._attend(query, self._gathered(key), self._gathered(value)).flatten(2)
        lengths = (packed_seq_params.cu_seqlens_q.diff() // self._group.size()).tolist()
        keys, values = (self._gathered(tensor[:, None]).split(lengths, dim=1) for tensor in (key, value))
        rows = zip(query[:, None].split(lengths), keys, values, strict=True)
        return torch.cat([self._attend(*row) for row in rows]).squeeze(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core's attention: each TP rank has the sinks of its own heads."""
        sinks = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self._tp_group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(sinks, prefix, {"softmax_offset": 0}, sharded_offsets, **groups)

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        """``[cp, seq / cp, ...]`` of all ranks, from each one's ``[seq / cp, ...]``."""
        whole = tensor_parallel.gather_from_sequence_parallel_region(own.contiguous(), group=self._group)
        return whole.unflatten(0, (self._group.size(), -1))

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """``query`` ``[seq / cp, rows, heads, width]``; ``keys`` and ``values`` ``[cp, seq / cp, rows, ...]``."""
        size, length = self._group.size(), len(query)
        places = torch.stack([_positions(length, rank, size, query.device) for rank in range(size)])
        own, others = places[self._group.rank()][:, None], places.flatten()[None, :]
        visible = others <= own
        if self._window is not None:
            visible &= others >= own - self._window
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        if self.softmax_offset is not None:
            visible, keys, values = _with_sink(self.softmax_offset, visible, keys, values)
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            keys.permute(1, 2, 0, 3),
            values.permute(1, 2, 0, 3),
            attn_mask=visible,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != keys.shape[2],
        )
        return context.permute(2, 0, 1, 3)


def _with_sink(
    sinks: torch.Tensor, visible: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A mask that is added to the scores, ``[heads, queries, keys + 1]``, keys and values, each with one more: zeros,
    so that the mask alone is its score and it adds nothing.
    """
    hidden = torch.zeros_like(visible, dtype=keys.dtype).masked_fill(~visible, -torch.inf)
    scores = sinks.to(keys.dtype)[:, None, None].expand(-1, len(visible), 1)
    mask = torch.cat([hidden.expand(len(sinks), -1, -1), scores], dim=-1)
    keys, values = (F.pad(each, (0, 0) * (each.dim() - 1) + (0, 1)) for each in (keys, values))
    return mask, keys, values


def _positions(length: int, rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Where in the row the ``length`` tokens of a rank stand."""
    half = torch.arange(length // 2, device=device)
    return torch.cat([half + rank * len(half), half + (2 * size - 1 - rank) * len(half)])
