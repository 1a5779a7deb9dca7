"""Turns the outcome of a step into the record that the event log holds of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.clock import StepClock
from pipeline.config.schema import EntropyConfig
from pipeline.monitoring.event_kinds import StepRecord
from pipeline.monitoring.memory import resident_gib
from pipeline.monitoring.timeline import timeline
from pipeline.types import SampleGroup, StepOutcome, StepSamples


def step_record(outcome: StepOutcome, entropy: EntropyConfig, clock: StepClock, outside: float) -> StepRecord:
    """The record of a step that has just ended.

    ``entropy``: the run's. ``outside``: seconds that ``clock``, the step's, has not seen.
    """
    stats, decision, following = outcome.stats, outcome.decision, outcome.following
    low, high = outcome.band
    lanes, idle = timeline(clock, outcome.busy, time.perf_counter())
    return StepRecord(
        step=outcome.step,
        time=time.time(),
        entropy_sum=stats.entropy.sum,
        entropy_count=stats.entropy.count,
        entropy_filtered=following.filtered_entropy,
        band_low=low,
        band_high=high,
        target=following.target,
        temperature=decision.temperature,
        command=decision.command,
        actuator="none" if following.state == "off" else entropy.actuator,
        band_of=entropy.band_of,
        state=following.state,
        reason=following.reason,
        positives=outcome.positives,
        stale_samples=outcome.samples.stale,
        held=outcome.held,
        loss=stats.loss,
        grad_norm=stats.grad_norm,
        learning_rate=stats.learning_rate,
        weight_version=outcome.step - round(stats.entropy.staleness),
        gain=following.gain,
        metrics=stats.metrics,
        seconds={**clock.seconds(outside), "learner": stats.seconds, "drawing": outcome.drawing_s},
        memory={"driver": resident_gib(), **stats.memory},
        sync=outcome.rollouts["sync"],
        engines=outcome.rollouts["engines"],
        ages=outcome.samples.ages(outcome.step),
        idle=idle,
        began=clock.began,
        timeline=lanes,
        episodes=episode_figures(outcome.samples),
        **rollout_figures(outcome.samples),
    )


def rollout_figures(drawn: StepSamples) -> dict[str, Any]:
    """The fields of a ``StepRecord`` that follow from verified samples. Means over no samples are NaN."""
    groups = [group.samples for group in drawn.main if group.samples]
    samples = [sample for group in groups for sample in group]
    others = [sample for group in drawn.auxiliary for sample in group.samples]
    tokens = {"main": drawn.main, "auxiliary": drawn.auxiliary}
    if drawn.repeated:
        tokens["repeated"] = drawn.repeated
    unjudged = [bool(sample.verifier_error) for sample in (*samples, *others)]
    rewards = [[sample.reward for sample in group] for group in groups]
    return {
        "reward": _mean([sample.reward for sample in samples]),
        "all_equal_groups": _mean([min(group) == max(group) for group in rewards]),
        "response_length": _mean([sample.drawn_tokens for sample in samples]),
        "truncated": _mean([sample.finish_reason == "length" for sample in samples]),
        "verifier_errors": sum(unjudged),
        "unjudged": _mean(unjudged) if unjudged else 0.0,
        "prefix_cache": _prefix_cache([*drawn.main, *drawn.auxiliary]),
        "tokens": {role: sum(s.drawn_tokens for g in of_role for s in g.samples) for role, of_role in tokens.items()},
    }


def _prefix_cache(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """What engines had to read before they drew, and found in their caches; nothing where they found none."""
    cached = sum(sample.cached_tokens for group in groups for sample in group.samples)
    if not cached:
        return {}
    starts = [turn.start for group in groups for sample in group.samples for turn in sample.turns]
    prompts = [len(group.prompt.token_ids) * max(1, len(s.turns)) for group in groups for s in group.samples]
    read = sum(prompts) + sum(starts)
    return {"read": read, "cached": cached, "share": cached / read}


def episode_figures(drawn: StepSamples) -> dict[str, float]:
    """Of main episodes: mean turns, tokens that nobody drew or that are not trained on, the share of each stop reason.

    Nothing of single answers.
    """
    samples = [sample for group in drawn.main for sample in group.samples if sample.stop_reason]
    if not samples:
        return {}
    reasons = Counter(sample.stop_reason for sample in samples)
    return {
        "turns": _mean([len(sample.turns) for sample in samples]),
        "given_tokens": _mean([len(sample.token_ids) - sample.drawn_tokens for sample in samples]),
        "dropped_tokens": _mean([sample.dropped_tokens for sample in samples]),
        **{reason: count / len(samples) for reason, count in sorted(reasons.items())},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
