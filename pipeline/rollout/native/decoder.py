"""A compact key-value-cache decoder over Hugging Face tensors, in float32: dense families and mixtures of experts.

Reference behaviour is transformers' ``modeling_llama``, ``modeling_mistral``, ``modeling_qwen2`` and
``modeling_qwen3``; they differ only in the biases of the attention projections and in Qwen3's RMSNorm of each query and
key head. Experts are those of ``modeling_qwen3_moe``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from pipeline.model import layout
from pipeline.model.architecture import Architecture, Moe
from pipeline.model.rotary import attention_factor, frequencies

Routes = list[torch.Tensor]  # of every layer with experts, as they come


class State(NamedTuple):
    """What a delta net keeps of rows, however long they are."""

    convolution: torch.Tensor  # [rows, channels, kernel]: what the convolution saw last
    recurrent: torch.Tensor  # [rows, heads, key, value]


# by layer; keys and values [rows, heads, columns, head_dim]
KeyValues = list[tuple[torch.Tensor, torch.Tensor] | State]


class AnyDecoder(Protocol):
    """What the native engine asks of a set of weights that is ready to run; ``Decoder`` says what it means."""

    model: Architecture

    def reserve(self, positions: int) -> None:
        """Prepare for ``positions`` tokens."""
        ...

    def prefill(self, tokens: torch.Tensor, routes: Routes | None = None) -> tuple[torch.Tensor, KeyValues]:
        """Run whole sequences of equal length."""
        ...

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KeyValues,
        column: int,
        padding: torch.Tensor | None,
        routes: Routes | None = None,
    ) -> torch.Tensor:
        """Run one token per row."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head of the final hidden states."""
        ...


class _FeedForward(Protocol):
    def __call__(self, x: torch.Tensor, routes: Routes | None) -> torch.Tensor:
        """``[..., hidden]`` in and out; a router adds its choice, int64 ``[..., top_k]``, to ``routes``."""
        ...


@dataclass(frozen=True)
class _Dense:
    gate_up: torch.Tensor  # [2 * ffn, hidden]
    down: torch.Tensor

    def __call__(self, x: torch.Tensor, routes: Routes | None = None) -> torch.Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


@dataclass(frozen=True)
class _Experts:
    moe: Moe
    router: torch.Tensor  # [experts, hidden]
    experts: Sequence[_Dense]

    def __call__(self, x: torch.Tensor, routes: Routes | None) -> torch.Tensor:
        shares, chosen = F.linear(x, self.router).softmax(-1).topk(self.moe.top_k, dim=-1)
        if self.moe.normalize:
            shares = shares / shares.sum(-1, keepdim=True)
        if routes is not None:
            routes.append(chosen)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            *tokens, place = (chosen == number).nonzero(as_tuple=True)
            out[tuple(tokens)] += self.experts[number](x[tuple(tokens)]) * shares[(*tokens, place)][:, None]
        return out


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # [heads + kv_heads, head_dim]
    output: torch.Tensor
    mlp_norm: torch.Tensor
    feed_forward: _FeedForward


class Decoder:
    """One set of weights, ready to run: q, k, v fused, gate and up fused, all in float32 on the CPU."""

    def __init__(self, model: Architecture, tensors: Mapping[str, torch.Tensor]) -> None:
        """``tensors`` by Hugging Face name: all of ``layout.tensor_shapes(model)``.

        Takes models that are ``native``.
        """
        self.model = model
        # The layout's rows are the fused matrices themselves. A copy even where the type is float32 already: the sender
        # may overwrite its tensors in the next optimizer step.
        fused = {
            row.parameter: torch.cat([tensors[source.name].to(torch.float32) for source in row.sources])
            for row in layout.rows(model)
        }
        self._embedding = fused["embedding.word_embeddings.weight"]
        self._final_norm = fused["decoder.final_layernorm.weight"]
        self._head = fused.get("output_layer.weight", self._embedding)
        self._layers = [self._layer(fused, number) for number in range(model.layers)]
        self._frequencies = frequencies(model)
        self._rotary = self._rotary_table(256)

    def _layer(self, fused: Mapping[str, torch.Tensor], number: int) -> _Layer:
        model, prefix, qk_norm = self.model, f"decoder.layers.{number}.", None
        attention = prefix + "self_attention."
        if model.qk_norm:
            query, key = (fused[f"{attention}{name}_layernorm.weight"] for name in "qk")
            qk_norm = torch.cat([query.expand(model.heads, -1), key.expand(model.kv_heads, -1)])
        return _Layer(
            input_norm=fused[prefix + "input_layernorm.weight"],
            qkv=fused[attention + "linear_qkv.weight"],
            qkv_bias=fused.get(attention + "linear_qkv.bias"),
            qk_norm=qk_norm,
            output=fused[attention + "linear_proj.weight"],
            mlp_norm=fused[prefix + "pre_mlp_layernorm.weight"],
            feed_forward=self._feed_forward(fused, prefix + "mlp.", number),
        )

    def _feed_forward(self, fused: Mapping[str, torch.Tensor], prefix: str, layer: int) -> _FeedForward:
        def dense(name: str) -> _Dense:
            return _Dense(fused[f"{name}linear_fc1.weight"], fused[f"{name}linear_fc2.weight"])

        moe = self.model.moe
        if moe is None or not self.model.is_moe(layer):
            return dense(prefix)
        experts = [dense(f"{prefix}experts.local_experts.{number}.") for number in range(moe.experts)]
        return _Experts(moe, fused[prefix + "router.weight"], experts)

    def _rotary_table(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._frequencies
        magnitude = attention_factor(self.model)
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # each [positions, head_dim]

    def reserve(self, positions: int) -> None:
        """Make the rotary tables cover ``positions`` tokens; call before decoding that far."""
        if positions > self._rotary[0].shape[0]:
            self._rotary = self._rotary_table(2 ** math.ceil(math.log2(positions)))

    def prefill(self, tokens: torch.Tensor, routes: Routes | None = None) -> tuple[torch.Tensor, KeyValues]:
        """Run whole sequences of equal length.

        ``tokens`` is int64 ``[rows, length]``. Returns the hidden states before the head, float32
        ``[rows, length, hidden]``, and each layer's keys and values. ``routes`` gets the experts of every token, int64
        ``[rows, length, top_k]`` of each layer with experts.
        """
        model, (rows, length) = self.model, tokens.shape
        self.reserve(length)
        rotary = self._rotary[0][:length, None], self._rotary[1][:length, None]
        x, cache = self._embedding[tokens], []
        for layer in self._layers:
            query, key, value = (part.transpose(1, 2) for part in self._project(layer, x, rotary))
            cache.append((key, value))
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).reshape(rows, length, model.heads * model.head_dim)
            x = self._finish_layer(layer, x, mixed, routes)
        return self._norm(x, self._final_norm), cache

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KeyValues,
        column: int,
        padding: torch.Tensor | None,
        routes: Routes | None = None,
    ) -> torch.Tensor:
        """Run one token per row; its keys and values go to ``column`` of the cache.

        Columns before it are attended to.

        ``tokens`` and ``positions`` are int64 ``[rows]``; ``padding`` is float32 ``[rows, columns]``, ``-inf`` on
        cache columns that hold nothing (None: all hold something). ``routes`` gets the experts of every row, int64
        ``[rows, top_k]`` of each layer with experts. Returns logits, float32 ``[rows, vocab]``.
        """
        model, rows = self.model, tokens.shape[0]
        rotary = self._rotary[0][positions][:, None], self._rotary[1][positions][:, None]
        bias = None if padding is None else padding[:, None, None, : column + 1]
        x = self._embedding[tokens]
        for layer, (keys, values) in zip(self._layers, cache, strict=True):
            query, key, value = self._project(layer, x, rotary)
            keys[:, :, column], values[:, :, column] = key, value
            mixed = F.scaled_dot_product_attention(
                query[:, :, None], keys[:, :, : column + 1], values[:, :, : column + 1], attn_mask=bias, enable_gqa=True
            )
            x = self._finish_layer(layer, x, mixed.reshape(rows, model.heads * model.head_dim), routes)
        return self.logits(self._norm(x, self._final_norm))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head of the final hidden states: ``[..., hidden]`` -> ``[..., vocab]``."""
        return F.linear(hidden, self._head)

    def _project(
        self, layer: _Layer, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value with positions applied, each ``[..., heads, head_dim]``."""
        model = self.model
        fused = F.linear(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        fused = fused.view(*x.shape[:-1], model.heads + 2 * model.kv_heads, model.head_dim)
        query_key, value = fused.split((model.heads + model.kv_heads, model.kv_heads), dim=-2)
        if layer.qk_norm is not None:
            query_key = F.rms_norm(query_key, (model.head_dim,), eps=model.norm_eps) * layer.qk_norm
        cos, sin = rotary
        turned = torch.addcmul(query_key * cos, query_key.roll(model.head_dim // 2, -1), sin)
        query, key = turned.split((model.heads, model.kv_heads), dim=-2)
        return query, key, value

    def _finish_layer(self, layer: _Layer, x: torch.Tensor, mixed: torch.Tensor, routes: Routes | None) -> torch.Tensor:
        x = x + F.linear(mixed, layer.output)
        return x + layer.feed_forward(self._norm(x, layer.mlp_norm), routes)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.model.hidden,), weight, self.model.norm_eps)


@torch.inference_mode()
def token_entropies(decoder: AnyDecoder, tokens: torch.Tensor) -> torch.Tensor:
    """Entropy, in nats at T=1, of what every token but the first was drawn from, given those before it.

    ``tokens`` is int64 ``[rows, length]``; the result float32 ``[rows, length - 1]``.
    """
    hidden, _ = decoder.prefill(tokens)
    log_probs = decoder.logits(hidden[:, :-1]).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
