"""Small Hugging Face folders, written without transformers; norms and biases are random so that a swapped one shows."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.model import architecture, layout

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
LLAMA = {  # a config.json that the configuration's rules accept
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "vocab_size": 100,
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 176,
    "max_position_embeddings": 4096,
}
EXTRA = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
    "glm4_moe": {
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "qwen3_next": {
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
}


def hf_config(family, **changes):
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 48,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 3,
        "torch_dtype": "float32",
        **EXTRA.get(family, {}),
    } | changes


def tensor_shapes(config):
    """Name -> shape of every parameter, in the order in which they are drawn.

    Of dense models: layers before the ends.
    """
    model = architecture.parse(config)
    shapes = layout.tensor_shapes(model)
    if model.moe:
        return shapes
    parts = ("input_", "q_proj.w", "k_proj.w", "v_proj.w", "o_proj", "post_", "gate_", "up_", "down_", "bias", "_norm")

    def place(name):
        if not name.startswith("model.layers."):
            return (1,)
        return 0, int(name.split(".")[2]), next(i for i, part in enumerate(parts) if part in name)

    return {name: shapes[name] for name in sorted(shapes, key=place)}


def random_tensors(config, seed):
    """Every parameter of the model, large enough that its next-token distributions are far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(name, shape):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1.0 + 0.3 * noise
        return 0.3 * noise if name.endswith("bias") else 1.5 * noise * shape[-1] ** -0.5

    return {name: tensor(name, shape) for name, shape in tensor_shapes(config).items()}


def write_folder(path: Path, family, seed=0, **changes):
    """A model folder; returns its path and its tensors."""
    config = hf_config(family, **changes)
    tensors = random_tensors(config, seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    return path, tensors
