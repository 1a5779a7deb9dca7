"""The target band of policy entropy over a run, the band that a run finds by itself, and the set-point that walks
toward it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from pipeline.config.schema import EVALUATIONS_FOR_A_BAND, BandConfig
from pipeline.entropy.state import Count, Stateful
from pipeline.entropy.target import Measured, Recommendation, recommend

RECENT = 10  # steps whose mean entropy stands beside an evaluation


class Band(Stateful):
    """Edges and target at every step, in nats per token, of a checked section.

    The target is the geometric middle: the controllers act on ln H, so both edges are then equally far from it
    ([0.27, 0.33] gives 0.2985).
    """

    def __init__(self, config: BandConfig, total_steps: int) -> None:
        self._schedule = config.schedule
        self._first = self._last = config.low, config.high
        self._hold = config.hold_steps  # before the move from the first edges to the last
        self._steps = 0  # of that move; 0: none
        self._points: list[tuple[float, tuple[float, float]]] = []
        if config.schedule in ("linear", "cosine"):
            self._last = config.end_low, config.end_high
            self._steps = max(1, config.schedule_steps or total_steps - self._hold)
        if config.schedule == "piecewise":
            self._points = [(start, (low, high)) for start, low, high in config.points]

    def at(self, step: int) -> tuple[float, float]:
        """Lower and upper edge at ``step``."""
        if self._schedule == "piecewise":
            return next((edges for start, edges in reversed(self._points) if step >= start), self._first)
        share = min(1.0, max(0, step - self._hold) / self._steps) if self._steps else 0.0
        if self._schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        (low, high), (end_low, end_high) = self._first, self._last
        return low + share * (end_low - low), high + share * (end_high - high)

    @property
    def watching(self) -> bool:
        """Whether nothing shall act above the band; of configured edges never."""
        return False

    @property
    def why(self) -> str:
        """Where the band comes from, for people; empty: from the configuration."""
        return ""

    def observe(self, step: int, entropy: float) -> None:
        """Take note of a step's entropy."""

    def evaluated(self, step: int, pass_at_k: Mapping[int, Any]) -> None:
        """Take note of an evaluation after ``step`` updates: its estimates of pass@k, by k."""

    def target(self, step: int) -> float:
        """The entropy a controller steers to at ``step``."""
        low, high = self.at(step)
        return math.sqrt(low * high)

    def slope(self, step: int) -> float:
        """Of ln target per step at ``step``; 0 where the schedule stands still or jumps."""
        return math.log(self.target(step + 1) / self.target(step)) if self._steps else 0.0

    @property
    def fingerprint(self) -> list[object]:
        """All that decides the band, for the check on resume; a longer run changes it only if the schedule
        stretches.
        """
        return [self._schedule, self._first, self._last, self._hold, self._steps, self._points]


class AutoBand(Band):
    """A band that the run finds: at the lowest entropy that still kept pass@k, as ``target.recommend`` reads it.

    Until then the configured edges are in force as a floor: ``watching`` says that above them nothing shall act. The
    band is found two evaluations after the one that it is set by, which is when its smoothed pass@k is known to fall.
    """

    STATE: ClassVar = {
        "recent": list[float],
        "recent_steps": list[Count],
        "measured": list[Measured],
        "found": Recommendation | None,
    }

    def __init__(self, config: BandConfig) -> None:
        super().__init__(BandConfig(low=config.low, high=config.high), 0)
        self._k = config.auto_k
        self.recent: list[float] = []  # entropies, oldest first
        self.recent_steps: list[int] = []  # theirs
        self.measured: list[Measured] = []
        self.found: Recommendation | None = None

    def at(self, step: int) -> tuple[float, float]:
        """See ``Band``."""
        low, high = self._first
        return (max(low, self.found.low), max(high, self.found.high)) if self.found else (low, high)

    @property
    def watching(self) -> bool:
        """Whether the band is still to be found."""
        return self.found is None

    @property
    def why(self) -> str:
        """Where the band comes from, for people; empty while it is watched for."""
        return self.found.verdict() if self.found else ""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Stateful``."""
        super().load_state_dict(state)
        if len(self.recent) != len(self.recent_steps):
            raise ValueError("controller state recent, recent_steps: expected as many numbers in one as in the other")

    @property
    def fingerprint(self) -> list[object]:
        """See ``Band``."""
        return ["auto", self._first, self._k]

    def observe(self, step: int, entropy: float) -> None:
        """See ``Band``. One more is kept than an evaluation needs: a step may have been trained beside it."""
        self.recent = [*self.recent, entropy][-RECENT - 1 :]
        self.recent_steps = [*self.recent_steps, step][-RECENT - 1 :]

    def evaluated(self, step: int, pass_at_k: Mapping[int, Any]) -> None:
        """See ``Band``. Evaluations before the first reading are left out: no entropy is known to them.

        The entropies are those of the steps before ``step``, whether or not a later one was trained beside.
        """
        estimate = pass_at_k[self._k]
        before = [entropy for at, entropy in zip(self.recent_steps, self.recent, strict=True) if at < step]
        if self.found or not before:
            return
        entropy = float(np.mean(before[-RECENT:]))
        self.measured.append(Measured(step, entropy, estimate.value, estimate.low, estimate.high))
        if len(self.measured) < EVALUATIONS_FOR_A_BAND:
            return
        proposed = recommend(self.measured, self._k)
        if proposed.step < self.measured[-2].step:
            self.found = proposed


def build_band(config: BandConfig, total_steps: int) -> Band:
    """The configured band."""
    return AutoBand(config) if config.schedule == "auto" else Band(config, total_steps)


class SetPoint(Stateful):
    """Walks toward the target by at most ``ramp`` per step in ln H, from the first reading on (bumpless); 0: jumps.

    While a band is still to be found it does not walk: it starts at the reading with which the band is known.
    """

    STATE: ClassVar = {"value": float | None}

    def __init__(self, ramp: float) -> None:
        self._ramp = ramp
        self.value: float | None = None

    def toward(self, target: float, entropy: float) -> float:
        """The set-point of this step. ``entropy``: the filtered reading, where the walk starts."""
        if not self._ramp:
            return target
        start = entropy if self.value is None else self.value
        move = min(self._ramp, max(-self._ramp, math.log(target / start)))
        self.value = start * math.exp(move)
        return self.value

    def forget(self) -> None:
        """Start anew at the next reading."""
        self.value = None
