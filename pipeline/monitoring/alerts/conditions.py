"""The conditions of alert rules, each updated step by step in constant memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import mul
from statistics import stdev
from typing import Any

from pipeline.monitoring.alerts.bounds import Bound, parse_bound
from pipeline.monitoring.alerts.schema import ConditionConfig
from pipeline.smoothing import ema

TINY = 1e-12  # what a figure of 0 counts as where its logarithm is taken


@dataclass(frozen=True)
class Moment:
    """What conditions are asked about: the figures in force, and the newest event (None: time has passed)."""

    figures: Mapping[str, float]
    event: Mapping[str, Any] | None
    steps: int  # step events seen


@dataclass(frozen=True)
class Finding:
    """Whether a condition holds; None where it cannot be said, as its figure has no value."""

    holds: bool | None
    value: float = math.nan
    bound: Bound | None = None  # the one that was crossed


UNKNOWN = Finding(None)


class Condition:
    """One condition, fed in order."""

    def __init__(self, config: ConditionConfig) -> None:
        self.config = config
        self.above, self.below = parse_bound(config.above), parse_bound(config.below)
        self._take = TAKE[config.take]
        self._recent: deque[float] = deque(maxlen=config.window)
        self._smooth = math.nan
        self._reference = math.nan  # best or first mean so far
        self._floor = 0  # what the best is counted from
        self._side = 0
        self._passes: deque[int] = deque(maxlen=max(1, config.swings))
        self._event_at: int | None = None

    def look(self, moment: Moment) -> Finding:
        """Judge a moment, once each, and remember what later ones need."""
        config = self.config
        if config.event:
            return self._events(moment)
        if not config.metric:
            return _controller(config, moment.event or {})
        value = moment.figures.get(config.metric)
        value = None if value is None else self._take(self, self._smoothed(value))
        if value is None:
            return UNKNOWN
        if config.swings:
            return self._swings(value, moment)
        return compare(value, self.above, self.below, moment.figures)

    def _smoothed(self, value: float) -> float:
        self._smooth = ema(self._smooth, value, self.config.smooth)
        return self._smooth

    def _events(self, moment: Moment) -> Finding:
        if moment.event is not None and moment.event["kind"] == self.config.event:
            self._event_at = moment.steps
        return Finding(self._event_at is not None and moment.steps - self._event_at < self.config.window)

    def _swings(self, value: float, moment: Moment) -> Finding:
        found = compare(value, self.above, self.below, moment.figures)
        if found.holds is None:
            return UNKNOWN
        side = 0 if not found.holds else 1 if found.bound is self.above else -1
        if side and side != self._side:
            if self._side:
                self._passes.append(moment.steps)
            self._side = side
        passes = sum(moment.steps - step < self.config.window for step in self._passes)
        return Finding(passes >= self.config.swings, float(passes), found.bound)

    def _value(self, value: float) -> float | None:
        return value

    def _mean(self, value: float) -> float | None:
        self._recent.append(value)
        return sum(self._recent) / len(self._recent) if len(self._recent) == self.config.window else None

    def _rate(self, value: float) -> float | None:
        """Least-squares slope of the logarithm, per step; None for negative figures."""
        if value < 0:
            return None
        self._recent.append(math.log(max(value, TINY)))
        count = self.config.window
        if len(self._recent) < count:
            return None
        weights = range(1 - count, count, 2)  # twice the distance from the middle
        return 6 * sum(map(mul, weights, self._recent)) / (count * (count * count - 1))

    def _of_best(self, value: float) -> float | None:
        """1 less the fall from the best mean by more than two standard errors of the mean, as a share of the best.

        Negative figures are counted from the whole number below all of them: rewards of -1 and 1 from -1.
        """
        self._floor = min(self._floor, math.floor(value))
        mean = self._mean(value)
        if mean is None:
            return None
        self._reference = mean if math.isnan(self._reference) else max(self._reference, mean)
        noise = 2 * stdev(self._recent) / math.sqrt(len(self._recent)) if len(self._recent) > 1 else 0.0
        best = self._reference - self._floor
        return 1 - max(0.0, self._reference - mean - noise) / best if best > 0 else None

    def _of_first(self, value: float) -> float | None:
        mean = self._mean(value)
        if mean is None:
            return None
        if math.isnan(self._reference):
            self._reference = mean
        return mean / self._reference if self._reference > 0 else None


TAKE: dict[str, Callable[[Condition, float], float | None]] = {
    "value": Condition._value,
    "mean": Condition._mean,
    "rate": Condition._rate,
    "of_best": Condition._of_best,
    "of_first": Condition._of_first,
}


def compare(value: float, above: Bound | None, below: Bound | None, figures: Mapping[str, float]) -> Finding:
    """Whether ``value`` is above the one bound or below the other; a bound without a value is not crossed."""
    limits = [(bound, bound.value(figures)) for bound in (above, below) if bound is not None]
    if all(limit is None for _, limit in limits):
        return UNKNOWN
    for bound, limit in limits:
        if limit is not None and (value > limit if bound is above else value < limit):
            return Finding(True, value, bound)
    return Finding(False, value, limits[0][0])


def _controller(config: ConditionConfig, event: Mapping[str, Any]) -> Finding:
    if "state" not in event:
        return UNKNOWN
    reason = event.get("reason", "")
    holds = (not config.state or event["state"] == config.state) and config.reason in reason
    return Finding(holds and not (config.without and config.without in reason))
