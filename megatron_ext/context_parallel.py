"""Context parallelism: each rank of a CP group computes two chunks of every row, the ``r``-th from the start and from
the end.

With ``cp`` ranks a row is cut into ``2 cp`` equal chunks; rank ``r`` has chunks ``r`` and ``2 cp - 1 - r``, which gives
all ranks the same share of a causal mask. Megatron's rotary embedding and Transformer Engine's attention take rows cut
so (megatron-core's ``get_batch_on_this_cp_rank``). Without Transformer Engine, :class:`GatheredAttention` is the
attention.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_ext.topology import Topology
from pipeline.objectives.loss import PolicyOutputs


def shard(rows: torch.Tensor, topology: Topology) -> torch.Tensor:
    """This rank's two chunks of ``rows`` ``[rows, seq]``, ``seq`` a multiple of ``2 cp``."""
    if topology.cp_size == 1:
        return rows
    chunks = rows.chunk(2 * topology.cp_size, dim=1)
    return torch.cat([chunks[topology.cp_rank], chunks[-1 - topology.cp_rank]], dim=1)


def own_targets(mask: torch.Tensor, topology: Topology) -> torch.Tensor:
    """This rank's part of ``mask`` (bool ``[rows, seq]``), with at least one target: a rank without any computes one
    for nobody.
    """
    own = shard(mask, topology)
    if not own.any():
        own = own.clone()
        own[0, 0] = True
    return own


def gather(outputs: PolicyOutputs, mask: torch.Tensor, topology: Topology) -> PolicyOutputs:
    """What all ranks of the group know of the targets of ``mask`` (bool ``[rows, seq]``), from each one's
    :func:`own_targets`.

    Differentiable: every rank then computes the same loss of all targets and differentiates it by its own outputs.
    """
    if topology.cp_size == 1:
        return outputs
    own = own_targets(mask, topology)
    local = shard(torch.arange(mask.numel(), device=mask.device).view_as(mask), topology)[
        own
    ]  # index of each own target
    fields = {name: value for name, value in vars(outputs).items() if value is not None}
    grid = torch.zeros(mask.numel(), len(fields), device=mask.device)
    grid = grid.index_copy(0, local, torch.stack(list(fields.values()), dim=-1))
    whole = tensor_parallel.reduce_from_tensor_model_parallel_region(grid, group=topology.cp_group)[mask.flatten()]
    return replace(outputs, **dict(zip(fields, whole.unbind(-1), strict=True)))


class GatheredAttention(MegatronModule):
    """Causal attention of this rank's queries over the keys and values of the whole row, gathered from the CP group.

    For where Transformer Engine, which passes keys and values around in a ring, is not at hand: exact, on any device,
    with the memory of all keys. Values may be of another width than keys (multi-head latent attention).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self._group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: Any = None,
        **__: Any,
    ) -> torch.Tensor:
        """``query`` ``[seq / cp, rows, heads, width]``, ``key`` and ``value`` with key-value heads: ``[seq / cp, rows,
        heads x width]``.
        """
        if packed_seq_params is not None:
            raise ValueError(
                "learner.packing with learner.context_parallel_size > 1 needs Transformer Engine: set one of the two "
                "off"
            )
        size, rank = self._group.size(), self._group.rank()
        positions = [_positions(query.shape[0], index, size, query.device) for index in range(size)]
        visible = torch.cat(positions)[None, :] <= positions[rank][:, None]
        gather = partial(tensor_parallel.gather_from_sequence_parallel_region, group=self._group)
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            gather(key.contiguous()).permute(1, 2, 0, 3),
            gather(value.contiguous()).permute(1, 2, 0, 3),
            attn_mask=visible,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def _positions(length: int, rank: int, size: int, device: torch.device) -> torch.Tensor:
    """Where in the row the ``length`` tokens of a rank stand."""
    half = torch.arange(length // 2, device=device)
    return torch.cat([half + rank * len(half), half + (2 * size - 1 - rank) * len(half)])
