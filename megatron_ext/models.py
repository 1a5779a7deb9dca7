"""Megatron's GPTModel for a Hugging Face architecture: Llama, Qwen2 and Qwen3 decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig

from megatron_ext.architecture import Architecture
from megatron_ext.topology import Topology
from megatron_ext.weights import layout

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(model: Architecture, topology: Topology, dtype: str = "fp32") -> GPTModel:
    """This rank's part of ``model``, on its device, parameters not yet filled (``weights.hf.load`` does that).

    The vocabulary is padded to a multiple of TP. Raises ``ValueError`` where the layout does not fit the model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    model.check_layout(topology.tp_size, topology.pp_size)
    gpt = GPTModel(
        transformer_config(model, topology, dtype),
        get_gpt_layer_local_spec(qk_layernorm=model.family.qk_norm, normalization="RMSNorm"),
        vocab_size=model.padded_vocab(topology.tp_size),
        max_sequence_length=model.max_positions,
        pre_process=topology.first_stage,
        post_process=topology.last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        rope_scaling=model.rope_factor is not None,
        rope_scaling_factor=model.rope_factor or 1.0,
    )
    # Not Float16Module: it would copy the logits to float32, which the log-prob kernel does chunk by chunk.
    gpt = gpt.to(device=topology.device, dtype=DTYPES[dtype])
    parameters = global_parameters(gpt)
    for row in layout.rows(model, topology.pp_size):
        if row.stage != topology.pp_rank or row.split is None:
            continue
        # Without initialisation megatron leaves weights unmarked; the gradient norm would then count rank 0's part only.
        if not hasattr(parameters[row.parameter], "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameters[row.parameter], True, row.split, 1)
    return gpt


def transformer_config(model: Architecture, topology: Topology, dtype: str) -> TransformerConfig:
    """megatron-core's configuration. Fusions are off: they need Transformer Engine or Apex kernels, on any device."""
    parameter_dtype = DTYPES[dtype]
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
    )
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.family.qk_norm,
        add_qkv_bias=model.family.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        params_dtype=parameter_dtype,
        pipeline_dtype=parameter_dtype,
        autocast_dtype=parameter_dtype,
        bf16=dtype == "bf16",
        use_cpu_initialization=topology.device.type == "cpu",
        perform_initialization=False,
        **fused,
    )


def global_parameters(gpt: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Parameters under layout names: as Megatron's, with the global instead of the stage's layer number."""
    first = gpt.decoder.layers[0].layer_number - 1
    named = {}
    for name, parameter in gpt.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        named[".".join(parts)] = parameter
    return named


@contextmanager
def only_targets(gpt: GPTModel, mask: torch.Tensor) -> Iterator[None]:
    """Within, the last stage computes logits only where ``mask`` (bool ``[rows, seq]``) is True: ``[1, n, vocab / tp]``, row-major.

    Logits are by far the largest tensor of a step, and those of prompts and padding are never used.
    """
    if not gpt.post_process:
        yield
        return

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0].transpose(0, 1)[mask]  # [seq, rows, hidden] -> [n, hidden]
        return (hidden[:, None], *args[1:])

    handle = gpt.output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
