"""Predicts the seconds that SGLang engines take to draw a step's samples, and their memory.

A roofline at stated speeds, not a measurement.

Every pass of decoding reads the weights once, whatever the number of running samples, and the keys and values of each
of them; it lasts as long as the slower of memory and arithmetic (Pope et al. 2022, arXiv 2211.05102, section 2). Left
out: latencies of kernels and all-reduces, the scheduler, and what samples of one prompt save by sharing its keys and
values after they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from launchers.plan.work import ITEM_SIZES, resamples
from pipeline.config.schema import RunConfig
from pipeline.model.architecture import Architecture
from pipeline.model.fp8_layout import quantised
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, rows
from pipeline.units import GIB

BANDWIDTH_SHARE = 0.6  # of the data sheet's memory bandwidth that decoding is assumed to reach
UTILIZATION = 0.45  # of the arithmetic peak, as ``speed.Machine``


@dataclass(frozen=True)
class Gpu:
    """One GPU of an engine. Defaults: H100 SXM's data sheet."""

    gib: float = 80.0
    tflops: float = 989.0  # dense bf16, 10^12 operations a second
    memory_gb_s: float = 3350.0  # 10^9 bytes a second


@dataclass(frozen=True)
class Weights:
    """Bytes of a model as an engine holds it, over all of its GPUs, and operations of one token."""

    dense: float  # read by every pass
    experts: float  # read as far as tokens choose them
    lookup: float  # embeddings, of which a pass reads single rows
    operations: float  # a multiplication and an addition are two

    @property
    def total(self) -> float:
        """Bytes of all weights together."""
        return self.dense + self.experts + self.lookup


@dataclass(frozen=True)
class Speeds:
    """How fast one engine computes."""

    dense: float  # bytes of weights that a pass reads from each GPU
    experts: float  # bytes of experts on each GPU, were all chosen
    unchosen: float  # share of the experts that a token does not choose, were all equally likely
    kv_token_bytes: float  # of one GPU
    operations: float  # of one token, without attention
    attention: float  # and for each token before it
    bandwidth: float  # bytes a second that a GPU reaches
    arithmetic: float  # operations a second that the engine reaches

    def by_memory(self, running: float, context: float) -> float:
        """Seconds in which a pass over ``running`` samples, each with ``context`` tokens, reads what it needs."""
        experts = self.experts * (1 - self.unchosen**running)
        return (self.dense + experts + running * context * self.kv_token_bytes) / self.bandwidth

    def by_arithmetic(self, running: float, context: float) -> float:
        """Seconds in which it computes."""
        return running * (self.operations + self.attention * context) / self.arithmetic

    def decode(self, running: float, context: float) -> float:
        """Seconds of the pass: a token for each sample."""
        return max(self.by_memory(running, context), self.by_arithmetic(running, context))

    def prefill(self, tokens: float) -> float:
        """Seconds to read a text of so many tokens."""
        return self.by_arithmetic(tokens, tokens / 2)


@dataclass(frozen=True)
class Rollout:
    """One step's samples on the busiest engine. Every response as long as it may be, unless a mean was given."""

    weights_bytes: float  # of one GPU
    kv_token_bytes: float  # of one GPU, per token
    kv_tokens: int  # that an engine's cache holds
    samples: int  # of the engine
    concurrent: int  # of them at a time
    prefill_seconds: float
    decode_seconds: float
    speeds: Speeds

    @property
    def seconds(self) -> float:
        """Seconds of the whole rollout phase."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def kv_bytes(self) -> float:
        """Bytes of the key-value cache on one GPU."""
        return self.kv_tokens * self.kv_token_bytes


def rollout(model: Architecture, config: RunConfig, gpu: Gpu, free_gib: float, mean_response: int = 0) -> Rollout:
    """Predict the rollout of one step, auxiliary samples included.

    ``free_gib``: what a GPU has when its engine starts, of which it takes ``rollout.sglang.mem_fraction_static``.
    ``kv_tokens`` is 0 or less where that does not hold the weights.
    """
    settings, tp = config.rollout, config.rollout.tensor_parallel_size
    held = weights(model, config)
    of = speeds(model, config, gpu, held)
    room = settings.sglang.mem_fraction_static * free_gib * GIB - held.total / tp
    kv_tokens = settings.sglang.max_total_tokens or math.floor(room / of.kv_token_bytes)
    kv_tokens = min(kv_tokens, math.floor(room / of.kv_token_bytes))
    samples, prompts = _busiest(config)
    response = mean_response or settings.max_new_tokens
    concurrent = min(samples, max(1, kv_tokens // (settings.max_prompt_tokens + response)))
    context = settings.max_prompt_tokens + response / 2  # of a running sample, on average over its life
    passes = samples / concurrent * response  # samples that end make room for waiting ones
    return Rollout(
        weights_bytes=held.total / tp,
        kv_token_bytes=of.kv_token_bytes,
        kv_tokens=kv_tokens,
        samples=samples,
        concurrent=concurrent,
        prefill_seconds=prompts * of.prefill(settings.max_prompt_tokens),
        decode_seconds=passes * of.decode(concurrent, context),
        speeds=of,
    )


def speeds(model: Architecture, config: RunConfig, gpu: Gpu, held: Weights) -> Speeds:
    """Of an engine with the weights ``held`` over its GPUs."""
    tp = config.rollout.tensor_parallel_size
    return Speeds(
        dense=held.dense / tp,
        experts=held.experts / tp,
        unchosen=1 - model.moe.chosen if model.moe else 1.0,
        kv_token_bytes=kv_token_bytes(model, tp, _item_size(config)),
        operations=held.operations,
        attention=_attention(model, 1.0),
        bandwidth=gpu.memory_gb_s * 1e9 * BANDWIDTH_SHARE,
        arithmetic=tp * gpu.tflops * 1e12 * UTILIZATION,
    )


def weights(model: Architecture, config: RunConfig) -> Weights:
    """Bytes of the whole model in the engine's number formats."""
    size, fp8 = _item_size(config), config.rollout.weight_dtype == "fp8"
    table = rows(model, Grid())
    experts = [row for row in table if row.expert is not None]
    lookup = [row for row in table if row.parameter.startswith("embedding") and not model.tied]
    dense = [row for row in table if row.expert is None and row not in lookup]
    return Weights(
        dense=_bytes(dense, size, fp8),
        experts=_bytes(experts, size, fp8),
        lookup=_bytes(lookup, size, fp8),
        operations=2 * (_entries(dense) + _entries(experts) * (model.moe.chosen if model.moe else 0.0)),
    )


def kv_token_bytes(model: Architecture, tp: int, item_size: int) -> float:
    """Bytes of one token's keys and values on one GPU, all layers.

    Heads fewer than GPUs are held by several GPUs, latent ones by all.
    """
    if model.mla:
        return float(model.layers * (model.mla.kv_lora + model.mla.rope_dim) * item_size)
    return 2.0 * model.attention_layers * max(1.0, model.kv_heads / tp) * model.head_dim * item_size


def _item_size(config: RunConfig) -> int:
    dtype = config.rollout.sglang.dtype
    return ITEM_SIZES[config.model.dtype] if dtype == "auto" else {"float32": 4, "bfloat16": 2}[dtype]


def _busiest(config: RunConfig) -> tuple[int, int]:
    """Samples and prompts of the engine with most, auxiliary ones included; a prompt's samples stay together."""
    settings, entropy = config.rollout, config.entropy
    prompts = math.ceil(settings.prompts_per_step / settings.engines)
    samples = prompts * settings.samples_per_prompt
    if resamples(entropy):
        again = math.ceil(entropy.auxiliary_prompts / settings.engines)
        return samples + again * entropy.auxiliary_samples, prompts + again
    return samples, prompts


def _attention(model: Architecture, context: float) -> float:
    """Operations of one token's attention to ``context`` tokens before it."""
    widths = 2 * model.head_dim if model.mla is None else 2 * model.mla.kv_lora + model.mla.rope_dim  # absorbed
    return 2 * model.attention_layers * model.heads * widths * context


def _bytes(part: Iterable[Row], size: int, fp8: bool) -> float:
    return float(sum(row.entries * (1 if fp8 and quantised(row) else size) for row in part))


def _entries(part: Iterable[Row]) -> int:
    return sum(row.entries for row in part)
