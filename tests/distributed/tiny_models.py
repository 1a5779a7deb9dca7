"""Tiny Hugging Face folders of every family, norms and biases randomised so that a swapped mapping shows."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 37,  # not a multiple of TP
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "hidden_act": "silu",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
    "llama_tied": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "head_dim": 16,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "tie_word_embeddings": False,
        "sliding_window": None,
        "vocab_size": 1000,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "tie_word_embeddings": False,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "tie_word_embeddings": False,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "tie_word_embeddings": False,
        "head_dim": 16,
        "partial_rotary_factor": 0.25,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_conv_kernel_dim": 4,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "tie_word_embeddings": False,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,  # what transformers gives the norms of compressed queries and keys, whatever this says
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "head_dim": 4,  # as transformers writes it: the rotary part
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 16,
        },
    },
}
CONFIGS["qwen3_5"] = {
    key: value for key, value in CONFIGS["qwen3_next"].items() if not key.endswith(("_step", "_layers", "_topk_prob"))
} | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
CONFIGS["qwen3_5_moe"] = CONFIGS["qwen3_5"] | {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
}
for key in ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok"):
    del CONFIGS["qwen3_5"][key]
CONFIGS["qwen3_moe_raw"] = CONFIGS["qwen3_moe"] | {
    "norm_topk_prob": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 2,
}
CONFIGS["glm4_moe_air"] = CONFIGS["glm4_moe"] | {"use_qk_norm": False, "first_k_dense_replace": 2}
CONFIGS["llama_yarn"] = CONFIGS["llama"] | {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
}
CONFIGS["qwen3_longrope"] = CONFIGS["qwen3"] | {
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 4 for i in range(8)],
        "long_factor": [3.0 + i for i in range(8)],
        "original_max_position_embeddings": 16,
    }
}
CONFIGS["mistral_dynamic"] = CONFIGS["mistral"] | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
CONFIGS["glm4_moe_yarn"] = (
    CONFIGS["glm4_moe"]
    | CONFIGS["llama_yarn"]
    | {key: CONFIGS["glm4_moe"][key] for key in ("architectures", "model_type")}
)
CONFIGS["mistral_window"] = CONFIGS["mistral"] | {"sliding_window": 4}
for name in ("qwen2", "qwen2_moe", "qwen3_moe_raw"):  # its layers 2 and 3, its layer 0, all layers
    CONFIGS[f"{name}_window"] = CONFIGS[name] | {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    }
CONFIGS["llama_linear"] = CONFIGS["llama"] | {"rope_scaling": {"type": "linear", "factor": 3.0}}
CONFIGS["llama3_short"] = CONFIGS["llama"] | {  # numbers that megatron-core's own Llama 3 scaling does not have
    "rope_scaling": LLAMA3_ROPE
    | {"low_freq_factor": 2.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 32}
}
CONFIGS["deepseek_plain_query"] = CONFIGS["deepseek_v3"] | {
    "q_lora_rank": None,
    "rope_scaling": None,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,  # the first of two stages has no experts
}


def config(name: str, **changes) -> dict:
    return {**BASE, **CONFIGS[name], **changes}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes, written down independently of the layout table."""
    d, v = config["hidden_size"], config["vocab_size"]
    out = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (v, d)
    latent = config["model_type"] == "deepseek_v3"
    block = "block_sparse_moe." if config["model_type"] == "mixtral" else "mlp."
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        delta = config.get("layer_types", ["full_attention"] * (i + 1))[i] == "linear_attention"
        layer |= _latent_attention(config) if latent else _delta_net(config) if delta else _attention(config)
        layer |= (
            _experts(config, block)
            if _has_experts(config, i)
            else _feed_forward("mlp.", d, config["intermediate_size"])
        )
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return out


def _attention(config: dict) -> dict[str, tuple[int, ...]]:
    d, hd = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    gate = 2 if "linear_num_key_heads" in config else 1
    layer = {
        "self_attn.q_proj.weight": (gate * q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
    }
    if config["model_type"] in ("qwen2", "qwen2_moe") or config.get("attention_bias"):
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config["model_type"] == "gpt_oss":
        layer |= {"self_attn.o_proj.bias": (d,), "self_attn.sinks": (config["num_attention_heads"],)}
    if config["model_type"].startswith("qwen3") or config.get("use_qk_norm"):
        layer |= {"self_attn.q_norm.weight": (hd,), "self_attn.k_norm.weight": (hd,)}
    return layer


def _latent_attention(config: dict) -> dict[str, tuple[int, ...]]:
    d, heads, kv = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    layer = {
        "self_attn.kv_a_proj_with_mqa.weight": (kv + rope, d),
        "self_attn.kv_a_layernorm.weight": (kv,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), kv),
        "self_attn.o_proj.weight": (d, heads * value),
    }
    if (rank := config["q_lora_rank"]) is None:
        return layer | {"self_attn.q_proj.weight": (heads * (nope + rope), d)}
    return layer | {
        "self_attn.q_a_proj.weight": (rank, d),
        "self_attn.q_a_layernorm.weight": (rank,),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), rank),
    }


def _delta_net(config: dict) -> dict[str, tuple[int, ...]]:
    d, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    if config["model_type"] == "qwen3_next":
        projections = {"qkvz": 2 * keys + 2 * values, "ba": 2 * heads}
    else:
        projections = {"qkv": 2 * keys + values, "z": values, "b": heads, "a": heads}
    return {
        **{f"linear_attn.in_proj_{name}.weight": (rows, d) for name, rows in projections.items()},
        "linear_attn.conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.A_log": (heads,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (d, values),
    }


def _has_experts(config: dict, layer: int) -> bool:
    if config["model_type"] in ("deepseek_v3", "glm4_moe"):
        return layer >= config["first_k_dense_replace"]
    if config["model_type"] in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        return layer not in config["mlp_only_layers"] and (layer + 1) % config["decoder_sparse_step"] == 0
    return config["model_type"] in ("mixtral", "qwen3_5_moe_text", "gpt_oss")


def _stacked_experts(config: dict) -> dict[str, tuple[int, ...]]:
    count, d, width = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    return {
        "mlp.router.weight": (count, d),
        "mlp.router.bias": (count,),
        "mlp.experts.gate_up_proj": (count, d, 2 * width),
        "mlp.experts.gate_up_proj_bias": (count, 2 * width),
        "mlp.experts.down_proj": (count, width, d),
        "mlp.experts.down_proj_bias": (count, d),
    }


def as_sent(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A folder's tensors as an engine takes them: those that all experts share, by expert."""
    sent = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        if not module.endswith(".experts"):
            sent[name] = tensor
            continue
        kind = "bias" if own.endswith("_bias") else "weight"
        for expert, whole in enumerate(tensor):
            halves = {"gate_proj": whole[..., 0::2], "up_proj": whole[..., 1::2]}
            for layer, values in (halves if "gate_up" in own else {"down_proj": whole}).items():
                sent[f"{module}.{expert}.{layer}.{kind}"] = values.T if kind == "weight" else values
    return sent


def _experts(config: dict, block: str) -> dict[str, tuple[int, ...]]:
    if config["model_type"] == "gpt_oss":
        return _stacked_experts(config)
    d, mixtral = config["hidden_size"], block != "mlp."
    width = config["intermediate_size" if mixtral else "moe_intermediate_size"]
    count = next(config[key] for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in config)
    layer = {block + "gate.weight": (count, d)}
    for expert in range(count):
        layer |= _feed_forward(f"{block}experts.{expert}.", d, width, *(("w1", "w3", "w2") if mixtral else ()))
    if "n_routed_experts" in config:
        layer |= {"mlp.gate.e_score_correction_bias": (count,)}
        layer |= _feed_forward("mlp.shared_experts.", d, width * config["n_shared_experts"])
    if "shared_expert_intermediate_size" in config:
        layer |= {"mlp.shared_expert_gate.weight": (1, d)}
        layer |= _feed_forward("mlp.shared_expert.", d, config["shared_expert_intermediate_size"])
    return layer


def _feed_forward(prefix: str, hidden: int, width: int, gate="gate_proj", up="up_proj", down="down_proj"):
    return {
        f"{prefix}{gate}.weight": (width, hidden),
        f"{prefix}{up}.weight": (width, hidden),
        f"{prefix}{down}.weight": (hidden, width),
    }


def weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _centre(config, name) + 0.3 * torch.randn(shape, generator=generator)
        for name, shape in sorted(shapes(config).items())
    }


def _centre(config: dict, name: str) -> float:
    """Norms of a model with delta nets multiply by 1 + weight, but for those of the nets."""
    zero_centred = "linear_num_key_heads" in config and "linear_attn" not in name
    return float("norm" in name and not zero_centred)


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor] | None = None, files: int = 1) -> Path:
    """A Hugging Face folder; with several ``files`` it has an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(config) if tensors is None else tensors
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def hf_model(folder: Path) -> torch.nn.Module:
    """transformers' own model."""

    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
