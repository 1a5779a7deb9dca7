"""A compact key-value-cache decoder over Hugging Face tensors: Llama, Mistral, Qwen2 and Qwen3, in float32.

Reference behaviour is transformers' ``modeling_llama``, ``modeling_mistral``, ``modeling_qwen2`` and ``modeling_qwen3``; they
differ only in the biases of the attention projections and in Qwen3's RMSNorm of each query and key head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.rollout.engine import EngineError

KeyValues = list[
    tuple[torch.Tensor, torch.Tensor]
]  # per layer: keys and values, each [rows, kv_heads, columns, head_dim]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class DecoderConfig:
    """What of ``config.json`` decides the computation."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    tied: bool  # lm_head is embed_tokens
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    rope: Mapping[str, Any]  # rope_theta, rope_type and the parameters of the type

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a ``config.json``. Raises ``EngineError`` for a model that this decoder does not compute."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise EngineError(f"native engine: model_type {family!r} is none of {FAMILIES}; use rollout.engine=sglang")
        for feature, value in (("mlp_bias", True), ("use_sliding_window", True)):
            if config.get(feature) == value:
                raise EngineError(f"native engine: {feature}={value} is not supported; use rollout.engine=sglang")
        if family == "mistral" and config.get("sliding_window", 4096) is not None:  # transformers' value where absent
            raise EngineError("native engine: Mistral's sliding_window is not supported; use rollout.engine=sglang")
        if config.get("hidden_act", "silu") != "silu":
            raise EngineError(
                f"native engine: hidden_act {config['hidden_act']!r} is not silu; use rollout.engine=sglang"
            )
        heads = int(config["num_attention_heads"])
        bias = bool(config.get("attention_bias", False))
        rope = {"rope_theta": config.get("rope_theta", 10000.0)}
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            qk_norm=family == "qwen3",
            rope=rope | dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {}),
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (query, self.hidden),
            "self_attn.k_proj.weight": (key, self.hidden),
            "self_attn.v_proj.weight": (key, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, query),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }
        if self.qkv_bias:
            layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", query), ("k", key), ("v", key))}
        if self.output_bias:
            layer["self_attn.o_proj.bias"] = (self.hidden,)
        if self.qk_norm:
            layer |= {f"self_attn.{n}_norm.weight": (self.head_dim,) for n in "qk"}
        shapes = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        shapes |= {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocab, self.hidden)}


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # [heads + kv_heads, head_dim]
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor


class Decoder:
    """One set of weights, ready to run: q, k, v fused, gate and up fused, all in float32 on the CPU."""

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        # A copy even where the type is float32 already: the sender may overwrite its tensors in the next optimizer step.
        weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
        self.config = config
        self._embedding = weights["model.embed_tokens.weight"]
        self._final_norm = weights["model.norm.weight"]
        self._head = self._embedding if config.tied else weights["lm_head.weight"]
        self._layers = [self._fuse_layer(weights, f"model.layers.{i}.") for i in range(config.layers)]
        self._frequencies = rope_frequencies(config.rope, config.head_dim)
        self._rotary = self._rotary_table(256)

    def _fuse_layer(self, weights: Mapping[str, torch.Tensor], prefix: str) -> _Layer:
        config = self.config

        def joined(names: str, kind: str) -> torch.Tensor:
            return torch.cat([weights[f"{prefix}{name}.{kind}"] for name in names.split()])

        qkv = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
        qk_norm = None
        if config.qk_norm:
            query, key = (weights[f"{prefix}self_attn.{n}_norm.weight"] for n in "qk")
            qk_norm = torch.cat([query.expand(config.heads, -1), key.expand(config.kv_heads, -1)])
        return _Layer(
            input_norm=weights[prefix + "input_layernorm.weight"],
            qkv=joined(qkv, "weight"),
            qkv_bias=joined(qkv, "bias") if config.qkv_bias else None,
            qk_norm=qk_norm,
            output=weights[prefix + "self_attn.o_proj.weight"],
            output_bias=weights[prefix + "self_attn.o_proj.bias"] if config.output_bias else None,
            mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
            gate_up=joined("mlp.gate_proj mlp.up_proj", "weight"),
            down=weights[prefix + "mlp.down_proj.weight"],
        )

    def _rotary_table(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # each [positions, head_dim]

    def reserve(self, positions: int) -> None:
        """Make the rotary tables cover ``positions`` tokens; call before decoding that far."""
        if positions > self._rotary[0].shape[0]:
            self._rotary = self._rotary_table(2 ** math.ceil(math.log2(positions)))

    def prefill(self, tokens: torch.Tensor) -> tuple[torch.Tensor, KeyValues]:
        """Run whole sequences of equal length.

        ``tokens`` is int64 ``[rows, length]``. Returns the hidden states before the head, float32
        ``[rows, length, hidden]``, and each layer's keys and values.
        """
        config, (rows, length) = self.config, tokens.shape
        self.reserve(length)
        rotary = self._rotary[0][:length, None], self._rotary[1][:length, None]
        x, cache = self._embedding[tokens], []
        for layer in self._layers:
            query, key, value = (part.transpose(1, 2) for part in self._project(layer, x, rotary))
            cache.append((key, value))
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            x = self._finish_layer(
                layer, x, mixed.transpose(1, 2).reshape(rows, length, config.heads * config.head_dim)
            )
        return self._norm(x, self._final_norm), cache

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: KeyValues, column: int, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """Run one token per row, whose keys and values go to ``column`` of the cache; columns before it are attended to.

        ``tokens`` and ``positions`` are int64 ``[rows]``; ``padding`` is float32 ``[rows, columns]``, ``-inf`` on
        cache columns that hold nothing (None: all hold something). Returns logits, float32 ``[rows, vocab]``.
        """
        config, rows = self.config, tokens.shape[0]
        rotary = self._rotary[0][positions][:, None], self._rotary[1][positions][:, None]
        bias = None if padding is None else padding[:, None, None, : column + 1]
        x = self._embedding[tokens]
        for layer, (keys, values) in zip(self._layers, cache, strict=True):
            query, key, value = self._project(layer, x, rotary)
            keys[:, :, column], values[:, :, column] = key, value
            mixed = F.scaled_dot_product_attention(
                query[:, :, None], keys[:, :, : column + 1], values[:, :, : column + 1], attn_mask=bias, enable_gqa=True
            )
            x = self._finish_layer(layer, x, mixed.reshape(rows, config.heads * config.head_dim))
        return self.logits(self._norm(x, self._final_norm))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head of the final hidden states: ``[..., hidden]`` -> ``[..., vocab]``."""
        return F.linear(hidden, self._head)

    def _project(
        self, layer: _Layer, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value with positions applied, each ``[..., heads, head_dim]``."""
        config = self.config
        fused = F.linear(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        fused = fused.view(*x.shape[:-1], config.heads + 2 * config.kv_heads, config.head_dim)
        query_key, value = fused.split((config.heads + config.kv_heads, config.kv_heads), dim=-2)
        if layer.qk_norm is not None:
            query_key = F.rms_norm(query_key, (config.head_dim,), eps=config.eps) * layer.qk_norm
        cos, sin = rotary
        turned = torch.addcmul(query_key * cos, query_key.roll(config.head_dim // 2, -1), sin)
        query, key = turned.split((config.heads, config.kv_heads), dim=-2)
        return query, key, value

    def _finish_layer(self, layer: _Layer, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        x = x + F.linear(mixed, layer.output, layer.output_bias)
        gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.config.hidden,), weight, self.config.eps)


@torch.inference_mode()
def token_log_probs(decoder: Decoder, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every token but the first given those before it.

    ``tokens`` is int64 ``[rows, length]``; the result float32 ``[rows, length - 1]``, at ``temperature``.
    """
    hidden, _ = decoder.prefill(tokens)
    log_probs = (decoder.logits(hidden[:, :-1]) / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def rope_frequencies(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Rotary frequencies, float32 ``[head_dim / 2]``: plain, ``linear`` or ``llama3`` (Llama 3.1, transformers' rope utilities)."""
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head_dim, 2).float() / head_dim)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(rope["factor"])
    if kind != "llama3":
        raise EngineError(f"native engine: rope_type {kind!r} is not supported; use rollout.engine=sglang")
    # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    original = float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    keep = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / float(rope["factor"]))
