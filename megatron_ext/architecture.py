"""What a Hugging Face ``config.json`` says about a model, checked against what this project can train. No megatron here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """What sets one model family apart from Llama's decoder."""

    name: str
    qkv_bias: bool = False  # biases on the query, key and value projections
    qk_norm: bool = False  # RMSNorm over each query and key head


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm=True),
    "DeepseekV3ForCausalLM": Family("deepseek_v3"),
}

# config.json keys whose value must be the first of the pair (also when absent), and why.
_FIXED: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "only the gated SiLU feed-forward is built"),
    "mlp_bias": (False, "feed-forward biases are not built"),
    "use_sliding_window": (False, "sliding-window attention is not built"),
}

# Llama 3's rotary scaling; megatron's RotaryEmbedding has these three built in (rotary_pos_embedding.py, _apply_scaling).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: which layers have one, and how tokens are routed."""

    layers: tuple[bool, ...]  # by layer: experts (True) or one dense feed-forward network
    experts: int
    ffn: int  # of one expert
    top_k: int
    shared_ffn: int = 0  # of all shared experts together; 0: none
    expert_bias: bool = False  # a correction bias on the router's scores (DeepSeek-V3, arXiv 2408.15664)
    sigmoid: bool = False  # score function of the router; else softmax
    normalize: bool = True  # the top_k probabilities are made to sum to one
    scaling: float = 1.0  # and multiplied by this
    groups: int = 1  # experts are chosen within the best top_groups of these
    top_groups: int = 1


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    q_lora: int  # 0: queries are not compressed
    kv_lora: int
    nope_dim: int  # of a head, without position
    rope_dim: int  # of a head, rotated
    v_dim: int


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder-only model."""

    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # entries of the Hugging Face embedding
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None  # Llama 3 scaling factor; None: plain rotary embedding
    tied: bool  # the output layer is the embedding
    moe: Moe | None = None
    mla: Mla | None = None

    def is_moe(self, layer: int | None) -> bool:
        """Whether a layer has experts."""
        return self.moe is not None and layer is not None and self.moe.layers[layer]

    def sizes(self) -> Mapping[str, int]:
        """The dimensions of parameters, by the names that layout templates use."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
        }
        if self.moe:
            sizes |= {"experts": self.moe.experts, "expert_ffn": self.moe.ffn, "shared_ffn": self.moe.shared_ffn}
        if self.mla:
            sizes |= {
                "q_lora": self.mla.q_lora,
                "kv_lora": self.mla.kv_lora,
                "kv_lora_rope": self.mla.kv_lora + self.mla.rope_dim,
                "mla_q": self.heads * (self.mla.nope_dim + self.mla.rope_dim),
                "mla_kv": self.heads * (self.mla.nope_dim + self.mla.v_dim),
                "mla_o": self.heads * self.mla.v_dim,
            }
        return sizes

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rounded up to a multiple of ``tp``; the added rows are zero and never sampled or exported."""
        return -(-self.vocab // tp) * tp

    def check_layout(self, tp: int, pp: int) -> None:
        """Raise ``ValueError`` where the model cannot be cut into ``tp`` x ``pp``."""
        for size, what in (
            (self.heads, "num_attention_heads"),
            (self.kv_heads, "num_key_value_heads"),
            (self.ffn, "intermediate_size"),
        ):
            if size % tp:
                raise ValueError(
                    f"learner.tensor_model_parallel_size={tp} does not divide {what}={size}: choose a divisor"
                )
        if self.layers % pp:
            raise ValueError(
                f"learner.pipeline_model_parallel_size={pp} does not divide num_hidden_layers={self.layers}: choose a divisor"
            )


def read(hf_path: Path) -> Architecture:
    """The architecture of a Hugging Face folder; see :func:`parse`."""
    path = hf_path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.hf_path={hf_path} has no config.json: it must be a Hugging Face model folder")
    return parse(json.loads(path.read_text()))


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes (transformers 4 and 5 spell the rotary keys differently).

    Raises ``ValueError`` that names the key, its value and what is supported.
    """
    names = config.get("architectures") or ["(no architectures key)"]
    if names[0] not in FAMILIES:
        raise ValueError(f"architectures={names[0]!r} is not supported; known: {', '.join(FAMILIES)}")
    family = FAMILIES[names[0]]
    for key, (value, why) in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: {key}={config[key]!r} is not supported: {why}; expected {value!r}")
    if config.get("attention_bias", False) and not family.qkv_bias:
        raise ValueError(
            f"config.json: attention_bias=True is not supported for {names[0]}: o_proj biases are not built"
        )
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise ValueError(f"config.json of {names[0]} lacks {', '.join(missing)}")
    theta, factor = _rope(config)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    return Architecture(
        family=family,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        ffn=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=theta,
        rope_factor=factor,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _rope(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Rotary base and Llama 3 scaling factor (``None``: no scaling)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; known: default, llama3")
    for key, value in _LLAMA3_ROPE.items():
        if rope.get(key, value) != value:
            raise ValueError(
                f"config.json: llama3 rope with {key}={rope[key]} is not supported by megatron-core; it has {value}"
            )
    if "factor" not in rope:
        raise ValueError("config.json: rope_type='llama3' lacks its factor")
    return theta, float(rope["factor"])
