"""Rules between keys of ``rollout``: engines, the GPUs they use, and what fits into their memory."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig

DETERMINISTIC = "--enable-deterministic-inference"


def rollout_problems(config: RunConfig) -> Iterator[Problem]:
    """Every combination of rollout keys that cannot work, or in which one of them would have no effect."""
    yield from _engines(config)
    yield from _stop(config)
    yield from _colocated(config)
    yield from _partial(config)
    yield from _deterministic(config)
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
    if not rollout.colocated:
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


def _partial(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if not rollout.partial:
        return
    if config.data.environment.name != "single":
        yield Problem(
            "rollout.partial",
            True,
            "a held answer cannot go on within an episode (data.environment.name="
            f"{config.data.environment.name}): its environment waits for the whole of it",
            "set it to false",
        )
    if not rollout.staleness:
        yield Problem(
            "rollout.partial",
            True,
            "has no effect with rollout.staleness=0, where nothing is drawn while weights change",
            "remove it, or set rollout.staleness",
        )
    if rollout.stop:
        yield Problem(
            "rollout.stop",
            rollout.stop,
            "a text is looked for in what was drawn since the last weight update (rollout.partial): one that ends "
            "across an update would go unseen",
            "set rollout.stop_token_ids, or rollout.partial=false",
        )
    if config.entropy.repeated_prompts:
        yield Problem(
            "entropy.repeated_prompts",
            config.entropy.repeated_prompts,
            "held responses (rollout.partial) are of several versions of the weights, cut where time decides: the "
            "reading would not repeat the same draws of one policy",
            "set it to 0, or rollout.partial=false",
        )


def _deterministic(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if not rollout.deterministic:
        return
    if not rollout.partial:
        yield Problem(
            "rollout.deterministic",
            True,
            "has no effect without rollout.partial: where responses end before the weights change, no clock decides "
            "which weights draw them",
            "remove it, or set rollout.partial=true",
        )
    if rollout.engine == "sglang" and DETERMINISTIC not in rollout.sglang.extra_args:
        yield Problem(
            "rollout.deterministic",
            True,
            "SGLang draws by a sample's own seed only in deterministic inference (on a GPU)",
            f"add {DETERMINISTIC} to rollout.sglang.extra_args, or remove it",
        )
    if rollout.sampling_rounds > 1:
        yield Problem(
            "rollout.sampling_rounds",
            rollout.sampling_rounds,
            "with rollout.deterministic: several steps are drawn at once, and which of them takes the next prompts for "
            "a further round is a matter of time",
            "set it to 1, or rollout.deterministic=false",
        )


def _kv_cache(config: RunConfig) -> Iterator[Problem]:
    rollout, tokens = config.rollout, config.rollout.sglang.max_total_tokens
    length = config.longest_row + config.kept_free
    if rollout.engine == "sglang" and 0 < tokens < length:
        yield Problem(
            "rollout.sglang.max_total_tokens",
            tokens,
            f"the KV cache cannot hold one sample: {config.room_words}",
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
