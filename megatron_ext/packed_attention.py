"""Packed sequences for megatron-core's own attention, which leaves them to Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention


class PackedAttention(DotProductAttention):
    """megatron-core's attention; of a packed sequence it attends to each row by itself.

    That is causal attention under a block-diagonal mask, without the mask or the scores outside the blocks: ``n``
    tokens in one would take ``n^2`` bytes for the mask and ``heads * n^2`` scores, rows of ``l`` tokens take ``heads *
    l^2`` each. Transformer Engine's kernels take the same ``PackedSeqParams``.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As upstream; with ``packed_seq_params``, ``[n, heads, channels]`` in and out and ``attention_mask``
        unused.
        """
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        heads = self.num_attention_heads_per_partition
        # From 0.19 on latent attention pads values to the width of keys, for Transformer Engine's sake.
        value = value[..., : self.hidden_size_per_partition // heads]
        rows = zip(*(tensor[:, None].split(lengths) for tensor in (query, key, value)), strict=True)
        done = [super(PackedAttention, self).forward(*row, None, *args, **kwargs) for row in rows]
        return torch.cat(done).view(len(query), heads, -1)
