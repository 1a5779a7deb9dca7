"""Proposes a first configuration for a model, its data and the GPUs at hand, as a commented YAML file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.plan.remedies import summary
from launchers.plan.speed import Machine
from launchers.plan.work import expected_response
from pipeline.config.errors import ConfigError
from pipeline.config.keys import leaf_keys
from pipeline.config.load import load_config
from pipeline.config.schema import SGLANG_KEEPS_FREE
from pipeline.evaluation.start import Start
from pipeline.model.architecture import Architecture
from pipeline.model.layout import rows
from pipeline.units import GIB, round_up

SIZES = (1, 2, 4, 8)  # TP and PP that are tried
ENGINE_SHARE = 0.5  # of an engine's GPU that weights may take; the rest is the cache
FEW_RIGHT = 6  # answers a step, as of the alert few_positives
BAND = (0.45, 0.55)  # of the entropy that was measured


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it has a configuration."""

    model: Architecture
    folder: Path  # of the model
    data: Path
    prompts: int  # lines of the data
    longest: int  # prompt tokens
    verifier: str  # "auto" where the lines name their own
    chat: bool  # whether prompts go through the chat template
    gpus: int  # 0: on the CPU
    gpu_gib: float
    start: Start | None  # None: not measured

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(row.entries for row in rows(self.model))


def keys(facts: Facts) -> dict[str, Any]:
    """Dotted keys and values that fit the facts.

    Raises ``ConfigError`` where no layout of the GPUs fits the model.
    """
    positions = facts.model.max_positions - (SGLANG_KEEPS_FREE if facts.gpus else 0)
    prompt = min(round_up(facts.longest, 8), positions - 1)
    response = min(2048 if facts.gpus else 256, positions - prompt)
    held_out = 0.1 if facts.prompts >= 100 else 0.2
    chosen: dict[str, Any] = {
        "name": facts.folder.resolve().name.replace(" ", "-"),
        "steps": 200,
        "runtime": "ray" if facts.gpus else "inline",
        "model.hf_path": str(facts.folder.resolve()),
        "model.dtype": "bf16" if facts.gpus else "fp32",
        "learner.optimizer.lr": 3e-4 if facts.parameters < 1e7 else 1e-5 if facts.parameters < 1e9 else 1e-6,
        "rollout.engine": "sglang" if facts.gpus else "native",
        "rollout.prompts_per_step": max(1, min(64 if facts.gpus else 16, facts.prompts // 4)),
        "rollout.samples_per_prompt": 16,
        "rollout.max_prompt_tokens": prompt,
        "rollout.max_new_tokens": response,
        "data.source.kind": "jsonl",
        "data.source.path": str(facts.data.resolve()),
        "data.chat_template": facts.chat,
        "data.verifier": facts.verifier,
        "data.held_out": held_out,
        "evaluation.every": 50,
        "evaluation.prompts": 64,
        "evaluation.samples": 16,
    }
    low, high = (leaf_keys()[f"entropy.band.{edge}"].default for edge in ("low", "high"))
    if facts.start is not None:
        low, high = (float(f"{share * facts.start.entropy:.2g}") for share in BAND)
    chosen |= {"entropy.band.low": low, "entropy.band.high": high}
    if (right := _right_answers(facts, chosen)) is not None and right < FEW_RIGHT:
        chosen["entropy.positive_mean"] = "samples"
    return chosen | (_layout(facts, chosen) if facts.gpus else {})


def _right_answers(facts: Facts, chosen: Mapping[str, Any]) -> float | None:
    """How many of a step's answers are right at the start; None: not measured, or no answer could be graded."""
    if facts.start is None or not facts.start.graded:
        return None
    drawn: int = chosen["rollout.prompts_per_step"] * chosen["rollout.samples_per_prompt"]
    return drawn * facts.start.right / facts.start.graded


def _layout(facts: Facts, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Half of the GPUs for the learner, half for engines; one GPU is shared by both."""
    shared = facts.gpus == 1
    learner, engine = (1, 1) if shared else (facts.gpus // 2, facts.gpus - facts.gpus // 2)
    weights = 2 * facts.parameters / GIB
    engine_tp = next(
        (tp for tp in SIZES if tp <= engine and not facts.model.kv_heads % tp and weights / tp < _room(facts)), 0
    )
    if not engine_tp:
        raise _too_large(facts, f"an engine would hold {weights:,.0f} GiB of weights")
    common = {
        "rollout.engines": engine // engine_tp,
        "rollout.tensor_parallel_size": engine_tp,
        "rollout.placement": "colocated" if shared else "disaggregated",
        "rollout.sglang.dtype": "bfloat16",
        "rollout.sglang.max_total_tokens": 0,
        "rollout.sglang.mem_fraction_static": 0.4 if shared else 0.8,
        "learner.transformer_impl": "transformer_engine",
        "learner.recompute_granularity": "full",
        "learner.max_tokens_per_micro_batch": max(
            8192, chosen["rollout.max_prompt_tokens"] + chosen["rollout.max_new_tokens"]
        ),
    }
    layouts = sorted(((tp, pp) for tp in SIZES for pp in SIZES if learner % (tp * pp) == 0), key=math.prod)
    for tp, pp in layouts:
        tried = common | {
            "learner.tensor_model_parallel_size": tp,
            "learner.pipeline_model_parallel_size": pp,
            "learner.data_parallel_size": learner // (tp * pp),
            "learner.sequence_parallel": tp > 1,
            "learner.optimizer.distributed": learner > tp * pp,
        }
        if _fits(facts, {**chosen, **tried}):
            return tried
    raise _too_large(facts, f"no layout of {learner} learner GPUs holds it with Adam's state")


def _room(facts: Facts) -> float:
    return facts.gpu_gib * (0.3 if facts.gpus == 1 else ENGINE_SHARE)


def _fits(facts: Facts, chosen: Mapping[str, Any]) -> bool:
    """Whether the configuration is valid and the learner's fullest GPU has room."""
    try:
        config = load_config(None, [f"{key}={_yaml(value)}" for key, value in chosen.items()])
        found = summary(facts.model, config, Machine(), facts.gpu_gib * GIB, expected_response(config), 1.25)
    except (ConfigError, ValueError):
        return False
    return bool(found["fits"])


def _too_large(facts: Facts, why: str) -> ConfigError:
    what = f"{facts.gpus} GPUs of {facts.gpu_gib:g} GiB are too few for {facts.parameters / 1e9:.1f}B parameters: {why}"
    return ConfigError("--gpus", facts.gpus, what, "name more GPUs, or a smaller model")


def text(facts: Facts, chosen: Mapping[str, Any]) -> str:
    """The configuration as YAML, with a comment on every value that the user may want to change."""
    return "\n".join(_lines(facts, chosen)) + "\n"


def _lines(facts: Facts, chosen: Mapping[str, Any]) -> Iterator[str]:
    comments = _comments(facts, chosen)
    yield "# Written by `isentrope init`. Every key with its meaning: `isentrope config show --config THIS_FILE`."
    open_sections: list[str] = []
    for key, value in sorted(chosen.items(), key=lambda item: _place(item[0], chosen)):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if open_sections[: depth + 1] != sections[: depth + 1]:
                comment = comments.get(".".join(sections[: depth + 1]), ())
                yield from (f"{'  ' * depth}# {line}" for line in comment)
                yield f"{'  ' * depth}{section}:"
        open_sections = sections
        yield from (f"{'  ' * len(sections)}# {line}" for line in comments.get(key, ()))
        yield f"{'  ' * len(sections)}{name}: {_yaml(value)}"


def _place(key: str, chosen: Mapping[str, Any]) -> tuple[int, int, int]:
    """Order of a key: sections in the order of their first key, plain keys of a section before its sections."""
    names = list(chosen)
    parts = key.split(".")
    first = min(index for index, name in enumerate(names) if name.split(".")[0] == parts[0])
    return first, len(parts), names.index(key)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) and not value.replace("_", "").isalnum() else str(value)


def _comments(facts: Facts, chosen: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Lines above a key or a section."""
    start = facts.start
    band: tuple[str, ...] = ("Nats per token. Not measured: the run prints where the model starts; docs/band.md.",)
    if start is not None:
        band = (
            f"Nats per token. The model starts at {start.entropy:.3g} on these data (over {start.tokens:,} tokens).",
            "Half of the start, give or take a tenth of that, is a first guess: GRPO alone would fall through it.",
            "Higher keeps more different answers, lower gains pass@1 sooner; docs/band.md.",
        )
    right = _right_answers(facts, chosen)
    positive: tuple[str, ...] = ()
    if start is not None and right is not None:
        positive = (
            f"{start.right} of {start.graded} measured responses are right, so about {right:.0f} of a step's.",
            "In a mean over so few (positives, the default) one lucky answer steers a whole step; docs/methods.md.",
        )
    cut = f" {start.truncated:.0%} of the measured responses ran into it." if start and start.truncated else ""
    return {
        "steps": ("A step draws prompts_per_step x samples_per_prompt responses and makes one update.",),
        "model.hf_path": (f"{facts.model.family.name}, {facts.parameters / 1e6:,.1f}M parameters.",),
        "learner": (
            (f"A layout for {facts.gpus} GPUs of {facts.gpu_gib:g} GiB; `isentrope plan learner` says what it needs.",)
            if facts.gpus
            else ()
        ),
        "learner.optimizer.lr": ("1e-6 is usual from 1B parameters up; small models bear more.",),
        "rollout.max_prompt_tokens": (f"The longest prompt has {facts.longest} tokens.",),
        "rollout.max_new_tokens": (f"The limit of a response.{cut}",),
        "data.verifier": (
            "auto: the verifier that each line names. Others: math, exact, choice, or module:function of your own.",
        ),
        "data.held_out": (f"Of {facts.prompts:,} prompts; evaluations use these only.",),
        "entropy.positive_mean": positive,
        "entropy.band": band,
    }
