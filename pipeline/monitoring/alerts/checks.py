"""Refuses alert rules that could never work, beyond wrong keys and types."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from pipeline.config.check import key_problems
from pipeline.config.errors import Problem
from pipeline.monitoring.alerts.bounds import parse_bound
from pipeline.monitoring.alerts.schema import CLOCK, ConditionConfig, RuleConfig


def problems_of(rule: RuleConfig) -> Iterator[Problem]:
    """What is wrong with a rule beyond keys and types."""
    yield from key_problems(rule)
    yield from _message_problems(rule.message)
    yield from _condition_problems("when", rule.when)
    if rule.guard != ConditionConfig():
        yield from _condition_problems("guard", rule.guard)
    if rule.guard.event:
        yield Problem("guard.event", rule.guard.event, "an event is a condition of its own", "give it in `when`")
    for name in ("above", "below"):
        yield from _bound_problems(f"clear.{name}", getattr(rule.clear, name))
    if (rule.clear.above or rule.clear.below) and not rule.when.metric:
        yield Problem("clear.above", rule.clear.above or rule.clear.below, "when.metric is not given", "remove it")
    if rule.when.metric.startswith(CLOCK) and rule.steps > 1:
        yield Problem(
            "steps", rule.steps, f"{rule.when.metric} goes by time, not by steps", "set steps to 1, raise above"
        )


def _bound_problems(name: str, text: str) -> Iterator[Problem]:
    try:
        parse_bound(text)
    except ValueError as error:
        yield Problem(name, text, f"not a bound: {error}", "write a number, a metric, or e.g. 1.1 * entropy/band_high")


def _condition_problems(name: str, condition: ConditionConfig) -> Iterator[Problem]:
    """Exactly one thing to look at, and only keys that have an effect on it."""
    controller = bool(condition.state or condition.reason or condition.without)
    looked_at = [word for word, given in (("metric", condition.metric), ("event", condition.event)) if given]
    looked_at += ["state"] if controller else []
    if len(looked_at) != 1:
        what = "looks at nothing" if not looked_at else f"looks at {' and '.join(looked_at)}"
        yield Problem(name, ", ".join(looked_at), what, "give one of metric, event, or state with reason")
        return
    if condition.take == "rate" and condition.window == 1:
        yield Problem(f"{name}.window", 1, "one step has no rate of change", "give a number of at least 2")
    for edge in ("above", "below"):
        yield from _bound_problems(f"{name}.{edge}", getattr(condition, edge))
    edges = bool(condition.above) + bool(condition.below)
    if condition.metric and not edges:
        yield Problem(name, condition.metric, "a metric without a bound", "give above, below, or both")
    if condition.swings and edges < 2:
        yield Problem(f"{name}.swings", condition.swings, "swings between what?", "give above and below")
    if not condition.metric:
        yield from _without_effect(name, condition)


def _without_effect(name: str, condition: ConditionConfig) -> Iterator[Problem]:
    for other in ("smooth", "take", "above", "below", "swings"):
        value = getattr(condition, other)
        if value != getattr(ConditionConfig(), other):
            yield Problem(f"{name}.{other}", value, "has an effect on a metric only", "remove it")
    if condition.window != 1 and not condition.event:
        yield Problem(f"{name}.window", condition.window, "has no effect on a state", "remove it")


def _message_problems(message: str) -> Iterator[Problem]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(message) if name is not None]
        strange = [name for name in fields if not re.fullmatch(r"[\w./-]+", name)]
    except ValueError as error:
        fields, strange = [], [str(error)]
    if strange:
        yield Problem("message", message, f"not a template: {strange[0]!r}", "write e.g. H={entropy/mean:.3g}")
