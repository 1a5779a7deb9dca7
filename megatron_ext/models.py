"""Megatron's GPTModel for a Hugging Face architecture: dense decoders, mixtures of experts, latent attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ext import cpu, delta_net, lora
from megatron_ext.context_parallel import GatheredAttention
from megatron_ext.delta_net import GatedDeltaNet, GatedSelfAttention
from megatron_ext.fp8 import emulate, transformer_engine
from megatron_ext.fp8.transformer_engine import Numerics
from megatron_ext.packed_attention import PackedAttention
from megatron_ext.topology import Topology
from pipeline.config.schema import LearnerConfig
from pipeline.model import layout
from pipeline.model.architecture import Architecture, Moe
from pipeline.model.grid import Grid
from pipeline.model.lora import adapters, beside_experts
from pipeline.model.rope import Yarn
from pipeline.model.rotary import attention_factor, frequencies

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_chunks(
    model: Architecture, topology: Topology, dtype: str = "fp32", options: LearnerConfig | None = None
) -> list[GPTModel]:
    """All of this rank's model chunks, in order: one, or ``topology.grid.vpp``; see ``build``."""
    chunks = range(topology.grid.vpp) if topology.grid.vpp > 1 else (None,)
    return [build(model, topology, dtype, chunk, options) for chunk in chunks]


def build(
    model: Architecture,
    topology: Topology,
    dtype: str = "fp32",
    chunk: int | None = None,
    options: LearnerConfig | None = None,
) -> GPTModel:
    """This rank's part of ``model``, on its device, parameters not yet filled (``weights.hf.load`` does that).

    With virtual stages (``topology.grid.vpp > 1``) it is model chunk ``chunk`` of them. The vocabulary is padded to a
    multiple of TP. Of ``options`` it takes sequence parallelism, recomputation, whose layers, FP8 and adapters, which
    are not filled either; the sizes are the topology's. By default megatron-core's own layers. Raises ``ValueError``
    where the layout does not fit the model, or FP8 the device.
    """
    options = options or LearnerConfig(transformer_impl="local")
    model.check_layout(topology.grid)
    if model.delta:
        delta_net.require_kernels(topology.device)
    numerics = transformer_engine.resolve(options, topology.device)
    cpu.install_layers()
    config = transformer_config(model, topology, dtype, options, numerics)
    with transformer_engine.own_layers_unfused():
        gpt = GPTModel(
            config,
            _spec(config, model, topology, chunk, numerics.impl, unfused=options.lora.rank > 0),
            vocab_size=model.padded_vocab(topology.tp_size),
            max_sequence_length=model.max_positions,
            pre_process=topology.first_stage and not chunk,
            post_process=topology.last_stage and chunk in (None, topology.grid.vpp - 1),
            parallel_output=True,
            share_embeddings_and_output_weights=model.tied,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            rotary_percent=model.partial_rotary,
            vp_stage=chunk,
        )
    if model.mla is None:  # megatron-core has not every scaling, and one setting alone of some
        gpt.rotary_pos_emb.inv_freq = frequencies(model).to(gpt.rotary_pos_emb.inv_freq.device)
    # Not Float16Module: it would copy the logits to float32, which the log-prob kernel does block by block.
    transformer_engine.place(gpt, topology.device, DTYPES[dtype])
    if numerics.emulated:
        emulate.install(gpt, numerics.precision)
    if model.family.biases:
        _leave_sums_out(gpt)
    _mark(global_parameters(gpt), model, topology.grid)
    if options.lora.rank:
        specs = adapters(model, topology.grid, options.lora)
        lora.attach(gpt, _names(gpt), specs, options.lora.scale, topology)
    return gpt


def _mark(parameters: Mapping[str, torch.Tensor], model: Architecture, grid: Grid) -> None:
    """Give parameters the types of the layout, and the marks by which megatron reduces gradients and their norm."""
    for row in layout.rows(model, grid):
        parameter = parameters.get(row.parameter)
        if parameter is None:
            continue
        if row.float32:
            parameter.data = parameter.data.float()
        # Without initialisation megatron leaves weights unmarked; the gradient norm would then count rank 0's part
        # only. Of experts it is added up over the ranks that hold different ones.
        parted = row.split is not None or row.expert is not None
        if parted and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, row.dim, 1)
        # megatron 0.16 reduces experts over the wrong ranks where only their TP is another (later versions do as here).
        if row.expert is not None:
            parameter.allreduce = grid.ep == 1 and grid.expert_tp == grid.tp  # type: ignore[attr-defined]
            # An expert sees all of its tokens; megatron would add up the gradients of its biases over TP ranks again.
            parameter.sequence_parallel = False  # type: ignore[attr-defined]


def _leave_sums_out(gpt: GPTModel) -> None:
    """Have experts, each of which is whole on its rank, not add up their outputs over that rank alone.

    megatron-core adds their biases in place (core/transformer/mlp.py, 0.16 to 0.19), which torch refuses of such a sum.
    """
    for module in gpt.modules():
        if isinstance(module, RowParallelLinear) and module.is_expert:
            module.explicit_expert_comm = True


def transformer_config(
    model: Architecture, topology: Topology, dtype: str, options: LearnerConfig, numerics: Numerics
) -> TransformerConfig:
    """megatron-core's configuration."""
    grid, parameter_dtype = topology.grid, DTYPES[dtype]
    config = (MLATransformerConfig if model.mla else TransformerConfig)(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=model.family.zero_centred,
        attention_output_gate=model.family.output_gate,
        qk_layernorm=model.qk_norm or model.mla is not None,
        add_qkv_bias=model.qkv_bias,
        add_bias_linear=model.family.biases,
        gated_linear_unit=True,
        **_activation(model),
        **_sights(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=grid.first_stage_layers,
        num_layers_in_last_pipeline_stage=grid.last_stage_layers,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.expert_tp,
        context_parallel_size=grid.cp,
        sequence_parallel=options.sequence_parallel,
        params_dtype=parameter_dtype,
        pipeline_dtype=parameter_dtype,
        variable_seq_lengths=grid.pp > 1,  # micro-batches differ in rows and length
        moe_token_dispatcher_type="alltoall",  # asked of dense models too where lengths vary
        autocast_dtype=parameter_dtype,
        bf16=dtype == "bf16",
        use_cpu_initialization=topology.device.type == "cpu",
        perform_initialization=False,
        **_fusions(model, options, numerics),
        **_schedule_config(grid),
        **_recompute_config(options),
        **_moe_config(model.moe, options),
        **_mla_config(model),
        # Only read where a checkpoint is written: layers that are not alike are not stacked.
        linear_attention_freq=[int(net) for net in model.delta.layers] if model.delta else None,
    )
    if (magnitude := _rotary_magnitude(model)) != 1:
        _multiply_rotary(config, magnitude)
    return config


def _fusions(model: Architecture, options: LearnerConfig, numerics: Numerics) -> dict[str, Any]:
    """Off but with Transformer Engine: they need its kernels or Apex's, on any device."""
    fused: dict[str, Any] = dict.fromkeys(
        (
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "apply_rope_fusion",
            "persist_layer_norm",
        ),
        False,
    ) | numerics.transformer_fields(mla=model.mla is not None, moe=model.moe is not None)
    if "moe_grouped_gemm" in fused and beside_experts(model, options.lora):
        fused["moe_grouped_gemm"] = False  # an adapter is beside the linear layer of one expert
    if options.routing_replay != "off" and fused.get("moe_router_fusion"):
        fused["moe_router_fusion"] = False  # the fused kernel chooses by itself
    if _rotary_magnitude(model) != 1:  # which the fused kernel for packed rows leaves out
        fused["apply_rope_fusion"] = False
    return fused


def _rotary_magnitude(model: Architecture) -> float:
    """What rotary embeddings are multiplied by outside megatron-core, which does latent attention's itself."""
    return 1.0 if model.mla else attention_factor(model)


def _activation(model: Architecture) -> dict[str, Any]:
    """What a feed-forward does with its gate and up halves; gpt-oss's numbers are those of transformers' class."""
    if not model.family.clamped:
        return {"activation_func": F.silu}
    return {"activation_func": quick_gelu, "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0}


def _sights(model: Architecture) -> dict[str, Any]:
    """What a token attends to, if not all tokens before it and nothing else."""
    sights: dict[str, Any] = {"softmax_type": "learnable"} if model.family.sinks else {}
    if model.window:
        sights["window_size"] = (model.window.tokens - 1, 0)
        sights["window_attn_skip_freq"] = [int(layer) for layer in model.window.layers]
    return sights


def _multiply_rotary(config: TransformerConfig, magnitude: float) -> None:
    """Have megatron-core's attention multiply sine and cosine by ``magnitude``, of whichever scaling it is.

    It reads YaRN's numbers (``yarn_rotary_pos_embedding.py``, 0.16 to 0.19): ``1 + 0.1 mscale log(factor)``.
    """
    config.yarn_rotary_scaling_factor = math.e
    config.yarn_mscale = 10 * (magnitude - 1)
    config.yarn_mscale_all_dim = 0.0


def _schedule_config(grid: Grid) -> dict[str, Any]:
    """With the defaults, which batch what a stage sends and receives, the interleaved schedule's gradients are wrong on
    gloo.
    """
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False} if grid.vpp > 1 else {}


def _recompute_config(options: LearnerConfig) -> dict[str, Any]:
    """Which activations are computed again (arXiv 2205.05198); selective is megatron's default, the core attention."""
    if options.recompute_granularity == "none":
        return {}
    if options.recompute_granularity == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": options.recompute_method,
        "recompute_num_layers": options.recompute_num_layers,
    }


def _moe_config(moe: Moe | None, options: LearnerConfig) -> dict[str, Any]:
    """Experts and router.

    No auxiliary loss but the z-loss, where it is asked for. Expert biases are ``megatron_ext.routing``'s to move:
    upstream would count padding too.
    """
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.experts,
        "moe_layer_freq": [int(layer) for layer in moe.layers],
        "moe_ffn_hidden_size": moe.ffn,
        "moe_shared_expert_intermediate_size": moe.shared_ffn or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": "sigmoid" if moe.sigmoid else "softmax",
        "moe_router_pre_softmax": not moe.sigmoid and not moe.normalize,
        "moe_router_topk_scaling_factor": moe.scaling,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": moe.groups if moe.groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.groups > 1 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_z_loss_coeff": options.moe_z_loss_coeff or None,
    }


def _mla_config(model: Architecture) -> dict[str, Any]:
    """Latent attention, with its own rotary embedding."""
    if model.mla is None:
        return {}
    sizes = {
        "q_lora_rank": model.mla.q_lora or None,
        "kv_lora_rank": model.mla.kv_lora,
        "qk_head_dim": model.mla.nope_dim,
        "qk_pos_emb_head_dim": model.mla.rope_dim,
        "v_head_dim": model.mla.v_dim,
        "rotary_base": model.rope_theta,
    }
    yarn = model.rope_scaling
    if not isinstance(yarn, Yarn):
        return sizes | {"rope_type": "rope", "rotary_scaling_factor": 1.0}  # the factor also scales the softmax
    return sizes | {
        "rope_type": "yarn",
        "rotary_scaling_factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


class _LatentAttention(PackedAttention):
    """megatron-core's attention for values of another width than keys, which upstream leaves to Transformer Engine."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # upstream builds one without the two first, then one with them
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


class _LatentSelfAttention(MLASelfAttention):
    """megatron-core's latent attention with the modules it is given."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """From 0.19 on upstream insists on a norm of queries that are not compressed, fused by Transformer Engine."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class _RMSNorm(torch.nn.RMSNorm):
    """torch's, with a weight that megatron knows to have seen only this rank's tokens under sequence parallelism.

    A zero-centred weight counts from 1, in float32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._zero_centred = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._zero_centred:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


def _spec(
    config: TransformerConfig,
    model: Architecture,
    topology: Topology,
    chunk: int | None,
    impl: str,
    *,
    unfused: bool = False,
) -> TransformerBlockSubmodules:
    """Modules for this rank's layers, dense and expert ones: Transformer Engine's, or megatron-core's own and ours
    where those refuse. ``unfused``: norms are modules of their own.
    """
    engine = impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=engine, normalization="RMSNorm", vp_stage=chunk)
    if not engine:
        _own_modules(spec, config)
    elif config.context_parallel_size > 1 and (model.family.sinks or model.window):  # its ring has not both
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = GatheredAttention
    for layer in spec.layer_specs if engine and unfused else ():
        _unfuse(layer.submodules)
    layers = topology.grid.chunks(model.layers)[topology.grid.place(topology.rank).pp][chunk or 0]
    spec.layer_specs = [_layer(each, model, number) for number, each in zip(layers, spec.layer_specs, strict=True)]
    return spec


def _layer(spec: ModuleSpec, model: Architecture, number: int) -> ModuleSpec:
    """The modules of layer ``number``; ``spec`` is one for all layers alike but for their attention."""
    block = spec.submodules
    if model.is_delta(number):
        attention = ModuleSpec(GatedDeltaNet, params={"delta": model.delta})
        return replace(spec, submodules=replace(block, input_layernorm=_RMSNorm, self_attention=attention))
    if model.family.output_gate:
        attention = replace(block.self_attention, module=GatedSelfAttention)
        return replace(spec, submodules=replace(block, self_attention=attention))
    return spec


def _own_modules(spec: TransformerBlockSubmodules, config: TransformerConfig) -> None:
    """Put modules of ours where megatron-core's own refuse."""
    spec.layer_norm = _RMSNorm
    for layer in spec.layer_specs:
        block = layer.submodules
        attention = block.self_attention.submodules
        block.input_layernorm = block.pre_mlp_layernorm = _RMSNorm
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = _RMSNorm
            setattr(attention, "kv_layernorm" if config.multi_latent_attention else "k_layernorm", _RMSNorm)
        if config.multi_latent_attention:
            block.self_attention.module = _LatentSelfAttention
            attention.core_attention = _LatentAttention
            if config.tensor_model_parallel_size > 1:  # whole on every rank, as in Transformer Engine and in the layout
                attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
        if config.context_parallel_size > 1:
            attention.core_attention = GatheredAttention


def _unfuse(block: Any) -> None:
    """Take the norms out of Transformer Engine's linear layers: adapters read what the norms give. Not yet run."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    block.input_layernorm = TENorm
    attention = block.self_attention.submodules
    if isinstance(attention, MLASelfAttentionSubmodules):
        attention.q_layernorm = attention.kv_layernorm = TENorm
        attention.linear_q_up_proj = attention.linear_kv_up_proj = TEColumnParallelLinear
    else:
        attention.linear_qkv = TEColumnParallelLinear
    if block.pre_mlp_layernorm is IdentityOp:
        block.pre_mlp_layernorm = TENorm
        block.mlp.submodules.linear_fc1 = TEColumnParallelLinear


def global_parameters(gpt: GPTModel) -> dict[str, torch.Tensor]:
    """Parameters, and the buffers that the layout has (expert biases), under layout names: global layer and expert
    numbers.
    """
    biases = ((name, buffer) for name, buffer in gpt.named_buffers() if name.endswith(".router.expert_bias"))
    return {_global_name(gpt, layout.canonical(name)): tensor for name, tensor in (*gpt.named_parameters(), *biases)}


def _names(gpt: GPTModel) -> dict[str, str]:
    """``gpt``'s own name of each parameter, by the layout's."""
    return {_global_name(gpt, layout.canonical(name)): name for name, _ in gpt.named_parameters()}


def _global_name(gpt: GPTModel, name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = gpt.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
        if "local_experts" in parts:
            number = parts.index("local_experts") + 1
            parts[number] = str(layer.mlp.local_expert_indices[int(parts[number])])
    return ".".join(parts)
