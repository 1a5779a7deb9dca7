"""Rules between keys of ``rollout``: engines, the GPUs they use, and what fits into their memory."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig


def rollout_problems(config: RunConfig) -> Iterator[Problem]:
    """Every combination of rollout keys that cannot work, or in which one of them would have no effect."""
    yield from _engines(config)
    yield from _stop(config)
    yield from _colocated(config)
    yield from _kv_cache(config)
    yield from _fp8_rollouts(config)


def _engines(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.engines > rollout.prompts_per_step:
        yield Problem(
            "rollout.engines",
            rollout.engines,
            f"more engines than prompts per step ({rollout.prompts_per_step}): some would never work",
            "use at most rollout.prompts_per_step engines",
        )
    if rollout.engine == "native" and rollout.tensor_parallel_size > 1:
        yield Problem(
            "rollout.tensor_parallel_size",
            rollout.tensor_parallel_size,
            "the native engine has no tensor parallelism",
            "set it to 1, or rollout.engine=sglang",
        )
    if rollout.engine == "native" and rollout.weight_transport != "plan":
        yield Problem(
            "rollout.weight_transport",
            rollout.weight_transport,
            "the native engine takes weights in memory, there is no server to carry them to",
            "remove it, or set rollout.engine=sglang",
        )


def _stop(config: RunConfig) -> Iterator[Problem]:
    if "" in config.rollout.stop:
        yield Problem("rollout.stop", config.rollout.stop, "an empty text ends every response at once", "remove it")


def _colocated(config: RunConfig) -> Iterator[Problem]:
    rollout, learner = config.rollout, config.learner
    if rollout.placement == "disaggregated":
        return
    if rollout.engine == "native":
        yield Problem(
            "rollout.placement",
            rollout.placement,
            "the native engine computes on the CPU and has no GPU memory to leave",
            "remove it, or set rollout.engine=sglang",
        )
    if rollout.staleness:
        yield Problem(
            "rollout.staleness",
            rollout.staleness,
            "samples are drawn ahead to keep engines busy while the learner trains, which colocated ones cannot be",
            "set it to 0, or set rollout.placement=disaggregated",
        )
    needed, ranks = rollout.engines * rollout.tensor_parallel_size, learner.world_size
    if needed > ranks:
        yield Problem(
            "rollout.engines",
            rollout.engines,
            f"{rollout.engines} engines of TP {rollout.tensor_parallel_size} need {needed} GPUs, "
            f"the learner they are colocated with has {ranks}",
            "lower rollout.engines or rollout.tensor_parallel_size, or set rollout.placement=disaggregated",
        )


def _kv_cache(config: RunConfig) -> Iterator[Problem]:
    rollout, tokens = config.rollout, config.rollout.sglang.max_total_tokens
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    if rollout.engine == "sglang" and 0 < tokens < length:
        yield Problem(
            "rollout.sglang.max_total_tokens",
            tokens,
            f"the KV cache cannot hold one sample: max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens "
            f"{rollout.max_new_tokens} = {length} tokens",
            f"use at least {length}, better several times as many, or 0 (SGLang decides)",
        )


def _fp8_rollouts(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.weight_dtype == "fp8" and rollout.engine == "sglang" and rollout.sglang.dtype == "float32":
        yield Problem(
            "rollout.sglang.dtype",
            "float32",
            "SGLang's FP8 layers (rollout.weight_dtype=fp8) have 16-bit activations",
            "use auto or bfloat16",
        )
