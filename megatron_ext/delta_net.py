"""Gated delta nets (arXiv 2412.06464) and gated attention for Megatron's layers, as Qwen3-Next has them.

megatron-core has a gated delta net too (``core/ssm/gated_delta_net``). It refuses packed rows (0.16; 0.19 without
flash-linear-attention), asks for flash-linear-attention even for its torch path, leaves the gradient of the norm's
weight unreduced over TP ranks, and orders the rows of its input projection otherwise than every checkpoint. Its torch
rule is what runs here on a CPU; on a GPU flash-linear-attention's kernel does.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch.nn.utils.rnn import pad_sequence

from pipeline.model.architecture import DeltaNet

_EPS = 1e-6  # of the l2 norm of queries and keys; flash-linear-attention and transformers have no setting for it


def require_kernels(device: torch.device) -> None:
    """Raise ``ValueError`` where a GPU lacks the kernel of the gated delta rule."""
    if device.type == "cuda" and importlib.util.find_spec("fla") is None:
        raise ValueError(
            "model.hf_path: the gated delta nets of this model need flash-linear-attention on a GPU: "
            "pip install flash-linear-attention"
        )


class GatedDeltaNet(MegatronModule):
    """Stands in for self-attention: ``[seq, rows, hidden]`` in and out, of packed rows ``[n, 1, hidden]``.

    Over TP ranks its heads are divided. The weights of the convolution and of the norm are whole on every rank, and
    their gradients are summed over the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        delta: DeltaNet,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.delta, self.tp_group = delta, pg_collection.tp
        self._ranks, self._rank = self.tp_group.size(), self.tp_group.rank()
        values = delta.value_heads * delta.value_dim
        layer: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size,
            delta.channels + values + 2 * delta.value_heads,
            init_method=config.init_method,
            gather_output=False,
            **layer,
        )
        self.conv_weight = self._parameter(delta.channels, 1, delta.kernel)
        self.dt_bias = self._parameter(delta.value_heads // self._ranks)
        self.A_log = self._parameter(delta.value_heads // self._ranks)
        self.norm_weight = self._parameter(delta.value_dim)
        self.out_proj = RowParallelLinear(
            values,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **layer,
        )

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """As megatron-core's attention; no mask is asked for: rows are padded on the right, and it looks back only."""
        projected, _bias = self.in_proj(hidden_states)
        if packed_seq_params is None:
            mixed = self._mix(projected.transpose(0, 1)).transpose(0, 1)
        else:  # each row by itself, so that nothing passes from one to the next
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            rows = self._mix(pad_sequence(projected[:, 0].split(lengths), batch_first=True))
            mixed = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[:, None]
        return self.out_proj(mixed.contiguous())[0], None

    def _mix(self, projected: torch.Tensor) -> torch.Tensor:
        """Input projections of this rank's heads ``[rows, seq, projections]`` to its values ``[rows, seq, values]``."""
        delta = self.delta
        heads, values = delta.key_heads // self._ranks, delta.per_key * delta.value_dim
        parts = (delta.key_dim, delta.key_dim, values, values, delta.per_key, delta.per_key)
        per_head = projected.unflatten(-1, (heads, -1)).split(parts, -1)
        *mixed, gate, beta, decay = (part.flatten(2) for part in per_head)
        convolved = self._convolve(torch.cat(mixed, -1)).split([part.shape[-1] for part in mixed], -1)
        query, key, value = (
            part.unflatten(-1, (-1, size))
            for part, size in zip(convolved, (delta.key_dim, delta.key_dim, delta.value_dim), strict=True)
        )
        query, key = (_l2_norm(part).repeat_interleave(delta.per_key, 2) for part in (query, key))
        log_decay = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias.float())
        rule = _rule(projected.device)
        result, _state = rule(query, key, value.contiguous(), g=log_decay, beta=beta.sigmoid())
        weight = copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tp_group)
        normed = F.rms_norm(result.float(), (delta.value_dim,), weight.float(), self.config.layernorm_epsilon)
        gated = normed * F.silu(gate.float()).view_as(normed)
        return gated.to(projected.dtype).flatten(2)

    def _convolve(self, channels: torch.Tensor) -> torch.Tensor:
        """The causal convolution of every channel by itself, ``[rows, seq, channels]`` in and out."""
        delta = self.delta
        keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
        weight = copy_to_tensor_model_parallel_region(self.conv_weight, group=self.tp_group)
        own = torch.cat([part.chunk(self._ranks)[self._rank] for part in weight.split((keys, keys, values))])
        seen = F.pad(channels.transpose(1, 2), (delta.kernel - 1, 0))
        return F.silu(F.conv1d(seen, own, groups=len(own))).transpose(1, 2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As ``MegatronModule``, which takes every parameter of a module's own for whole on every rank."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {"A_log": 0, "dt_bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return dict(sharded)


def _l2_norm(heads: torch.Tensor) -> torch.Tensor:
    values = heads.float()
    return (values * torch.rsqrt(values.square().sum(-1, keepdim=True) + _EPS)).to(heads.dtype)


def _rule(device: torch.device) -> Any:
    if device.type == "cpu":
        return torch_chunk_gated_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule


class GatedSelfAttention(SelfAttention):
    """megatron-core's attention with an output gate, whose rows follow the query's head by head, as in checkpoints."""

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = True,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key, value and gate, each ``[seq, rows, heads, head_dim]``, of this rank's heads."""
        mixed, _ = self.linear_qkv(hidden_states)
        groups, ranks, rank = self.config.num_query_groups, self.pg_collection.tp.size(), self.pg_collection.tp.rank()
        sharing = ranks // groups if groups < ranks else 1  # ranks that share a key-value head
        if sharing > 1:
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.pg_collection.tp)
            mixed = mixed.chunk(groups, -1)[rank // sharing]
        heads = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head))
        queries, key, value = heads.split((heads.shape[3] - 2, 1, 1), 3)
        query, gate = queries.flatten(2, 3).chunk(sharing, 2)[rank % sharing].unflatten(2, (-1, 2)).unbind(3)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key.squeeze(3), value.squeeze(3), gate
