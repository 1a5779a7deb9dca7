"""Small Hugging Face folders, written without transformers; norms and biases are random so that a swapped one shows."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.model import architecture, layout, stacked

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
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
    "gpt_oss": {
        "sliding_window": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
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
EXTRA["qwen3_5_moe_text"] = {key: value for key, value in EXTRA["qwen3_next"].items() if key != "norm_topk_prob"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25}
}
EXTRA["qwen3_5_text"] = {key: value for key, value in EXTRA["qwen3_5_moe_text"].items() if "expert" not in key}


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
    parts += ("linear_attn",)

    def place(name):
        if not name.startswith("model.layers."):
            return (1,)
        return 0, int(name.split(".")[2]), next(i for i, part in enumerate(parts) if part in name)

    return {name: shapes[name] for name in sorted(shapes, key=place)}


def random_tensors(config, seed):
    """Every parameter of the model, large enough that its next-token distributions are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    zero_centred = architecture.parse(config).family.zero_centred

    def tensor(name, shape):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return float(not zero_centred or "linear_attn" in name) + 0.3 * noise
        return 0.3 * noise if name.endswith("bias") else 1.5 * noise * shape[-1] ** -0.5

    return {name: tensor(name, shape) for name, shape in tensor_shapes(config).items()}


def write_folder(path: Path, family, seed=0, **changes):
    """A model folder; returns its path and its tensors, of which a folder may hold some as parts of others."""
    config = hf_config(family, **changes)
    tensors = random_tensors(config, seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    stored = stacked.stack(tensors, architecture.parse(config))
    save_file(stored, str(path / "model.safetensors"), metadata={"format": "pt"})
    return path, tensors


MROPE = {"mrope_interleaved": True, "mrope_section": [1, 1, 0], "rope_type": "default", "rope_theta": 1000.0}


def write_seeing_folder(path, experts="each"):
    """A folder as Qwen3.5's: a model of text within one that sees; ``experts`` "stacked" in a tensor for all."""
    config = hf_config("qwen3_5_moe_text", rope_parameters=MROPE)
    tensors = random_tensors(config, 0)
    stored = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    stored |= {"model.visual.patch_embed.proj.bias": torch.ones(3), "mtp.norm.weight": torch.ones(2)}
    for layer in range(config["num_hidden_layers"]) if experts == "stacked" else ():
        module = f"model.language_model.layers.{layer}.mlp.experts"
        kinds = (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
        for kind, parts in kinds:
            each = [
                torch.cat([stored.pop(f"{module}.{expert}.{part}.weight") for part in parts])
                for expert in range(config["num_experts"])
            ]
            stored[f"{module}.{kind}"] = torch.stack(each)
    whole = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": {key: value for key, value in config.items() if key != "architectures"},
        "vision_config": {"depth": 1},
        "tie_word_embeddings": False,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(whole))
    save_file(stored, str(path / "model.safetensors"), metadata={"format": "pt"})
    return tensors
