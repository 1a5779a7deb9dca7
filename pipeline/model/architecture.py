"""What a Hugging Face ``config.json`` says about a model, checked against what this project can train. No megatron here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.model.grid import Grid


@dataclass(frozen=True)
class Family:
    """What sets one model family apart from Llama's decoder."""

    name: str
    qkv_bias: bool = False  # biases on the query, key and value projections
    qk_norm: bool = False  # RMSNorm over each query and key head
    rope: tuple[str, ...] = ("default", "llama3")  # rotary scalings that are built


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm=True),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", rope=("default", "yarn")),
}

# config.json keys whose value must be the first of the pair (also when absent), and why: of all families, and of one.
_FIXED: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "only the gated SiLU feed-forward is built"),
    "mlp_bias": (False, "feed-forward biases are not built"),
    "use_sliding_window": (False, "sliding-window attention is not built"),
}
_FIXED_IN: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "deepseek_v3": {
        "topk_method": ("noaux_tc", "other ways of choosing experts are not built"),
        "scoring_func": ("sigmoid", "other router scores are not built"),
        "rope_interleave": (True, "megatron-core's latent attention takes rotary pairs interleaved"),
    },
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
class Yarn:
    """YaRN rotary scaling (arXiv 2309.00071) with DeepSeek's two magnitudes."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


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
    yarn: Yarn | None = None

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

    def check_layout(self, grid: Grid) -> None:
        """Raise ``ValueError`` where the model cannot be cut so; key-value heads may be fewer than TP, if they divide it."""
        dense = self.ffn if not all(self.is_moe(layer) for layer in range(self.layers)) else 0
        groups = 0 if self.mla or grid.tp % self.kv_heads == 0 else self.kv_heads
        fused = 0 if self.mla else (self.heads + 2 * self.kv_heads) * self.head_dim
        checks = [
            ("learner.tensor_model_parallel_size", grid.tp, self.heads, "num_attention_heads"),
            ("learner.tensor_model_parallel_size", grid.tp, groups, "num_key_value_heads"),
            ("learner.tensor_model_parallel_size", grid.tp, fused, "query, key and value rows"),
            ("learner.tensor_model_parallel_size", grid.tp, dense, "intermediate_size"),
        ]
        if self.moe:
            checks += [
                ("learner.tensor_model_parallel_size", grid.tp, self.moe.shared_ffn, "shared experts' columns"),
                ("expert tensor-parallel size (etp)", grid.expert_tp, self.moe.ffn, "moe_intermediate_size"),
                ("expert-parallel size (ep)", grid.ep, self.moe.experts, "experts"),
            ]
        elif grid.ep > 1:
            raise ValueError(f"expert-parallel size (ep)={grid.ep}: {self.family.name} has no experts; leave it at 1")
        if grid.first_stage_layers is None and grid.last_stage_layers is None:
            checks.append(("learner.pipeline_model_parallel_size", grid.pp, self.layers, "num_hidden_layers"))
        for key, size, dimension, what in checks:
            if dimension % size:
                raise ValueError(f"{key}={size} does not divide {what}={dimension}: choose a divisor")
        grid.chunks(self.layers)


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
    _require(config, *_REQUIRED)
    for key, (value, why) in {**_FIXED, **_FIXED_IN.get(family.name, {})}.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: {key}={config[key]!r} is not supported: {why}; expected {value!r}")
    if config.get("attention_bias", False) and not family.qkv_bias:
        raise ValueError(
            f"config.json: attention_bias=True is not supported for {names[0]}: o_proj biases are not built"
        )
    # Where Mistral's key is absent, transformers takes 4096.
    if family.name == "mistral" and config.get("sliding_window", 4096) is not None:
        raise ValueError(
            f"config.json: sliding_window={config.get('sliding_window', 4096)} is not supported: sliding-window attention "
            "is not built; expected null, as in Mistral models from v0.2 on"
        )
    heads, hidden, layers = (int(config[key]) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    theta, kind, scaling = _rope(config, family)
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        ffn=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=theta,
        rope_factor=_llama3(scaling) if kind == "llama3" else None,
        tied=bool(config.get("tie_word_embeddings", False)),
        moe=_MOE[family.name](config, layers) if family.name in _MOE else None,
        mla=_mla(config) if family.name == "deepseek_v3" else None,
        yarn=_yarn(scaling) if kind == "yarn" else None,
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


def _require(config: Mapping[str, Any], *keys: str) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"config.json of {config['architectures'][0]} lacks {', '.join(missing)}")


def _qwen3_moe(config: Mapping[str, Any], layers: int) -> Moe:
    if "num_local_experts" in config:  # what transformers 5 may write instead
        config = {"num_experts": config["num_local_experts"], **config}
    _require(config, "num_experts", "moe_intermediate_size", "num_experts_per_tok")
    step, dense = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or ())
    return Moe(
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        experts=int(config["num_experts"]),
        ffn=int(config["moe_intermediate_size"]),
        top_k=int(config["num_experts_per_tok"]),
        normalize=bool(config.get("norm_topk_prob", False)),
    )


def _deepseek_moe(config: Mapping[str, Any], layers: int) -> Moe:
    counts = ("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace")
    _require(
        config, "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok", "routed_scaling_factor", *counts
    )
    shared, groups, top_groups, first = (int(config[key] or 0) for key in counts)
    top_k, step = int(config["num_experts_per_tok"]), int(config.get("moe_layer_freq", 1))
    if bool(config.get("norm_topk_prob", True)) != (top_k > 1):
        raise ValueError(
            f"config.json: norm_topk_prob={config.get('norm_topk_prob', True)} with num_experts_per_tok={top_k} is not "
            "supported: megatron-core normalises sigmoid scores where it takes several experts, and only there"
        )
    if groups > 1 and top_k != 2 * top_groups:
        raise ValueError(
            f"config.json: num_experts_per_tok={top_k} with n_group={groups}, topk_group={top_groups} is not supported: "
            f"megatron-core ranks groups as DeepSeek-V3 does only at num_experts_per_tok={2 * top_groups}"
        )
    return Moe(
        layers=tuple(layer >= first and layer % step == 0 for layer in range(layers)),
        experts=int(config["n_routed_experts"]),
        ffn=int(config["moe_intermediate_size"]),
        top_k=top_k,
        shared_ffn=shared * int(config["moe_intermediate_size"]),
        expert_bias=True,
        sigmoid=True,
        scaling=float(config["routed_scaling_factor"]),
        groups=max(1, groups),
        top_groups=max(1, top_groups),
    )


_MOE: Mapping[str, Callable[[Mapping[str, Any], int], Moe]] = {"qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_moe}


def _mla(config: Mapping[str, Any]) -> Mla:
    _require(config, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return Mla(
        q_lora=int(config.get("q_lora_rank") or 0),
        kv_lora=int(config["kv_lora_rank"]),
        nope_dim=int(config["qk_nope_head_dim"]),
        rope_dim=int(config["qk_rope_head_dim"]),
        v_dim=int(config["v_head_dim"]),
    )


def _rope(config: Mapping[str, Any], family: Family) -> tuple[float, str, Mapping[str, Any]]:
    """Rotary base, kind of scaling and the parameters of that kind."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in family.rope:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; known: {', '.join(family.rope)}")
    if kind != "default" and "factor" not in rope:
        raise ValueError(f"config.json: rope_type={kind!r} lacks its factor")
    return theta, kind, rope


def _llama3(rope: Mapping[str, Any]) -> float:
    """Llama 3's scaling factor."""
    for key, value in _LLAMA3_ROPE.items():
        if rope.get(key, value) != value:
            raise ValueError(
                f"config.json: llama3 rope with {key}={rope[key]} is not supported by megatron-core; it has {value}"
            )
    return float(rope["factor"])


def _yarn(rope: Mapping[str, Any]) -> Yarn:
    """YaRN as transformers reads it: of ``mscale`` and ``mscale_all_dim`` both or none."""
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ValueError("config.json: yarn rope with attention_factor or truncate=False is not supported")
    if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
        raise ValueError("config.json: yarn rope with only one of mscale and mscale_all_dim is not supported")
    if "original_max_position_embeddings" not in rope:
        raise ValueError("config.json: yarn rope lacks original_max_position_embeddings")
    return Yarn(
        factor=float(rope["factor"]),
        original_positions=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 1),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )
