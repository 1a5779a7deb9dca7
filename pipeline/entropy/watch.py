"""Is the command at its limit, and does the entropy answer it?"""

from __future__ import annotations

import math
from statistics import fmean, linear_regression
from typing import ClassVar, Literal

from pipeline.entropy.state import Count, Stateful

AWAY_STEPS = 50  # of pushing before a response of the wrong sign is called one
_AWAY_GAP = 0.1  # |ln(H*/H)| by then, and its growth from each third of those steps to the next: an integral that
_AWAY_GROWTH = 0.02  # still gathers itself against the drift reaches neither
_RECOVERED = 0.7  # of its largest gap: once this is reached, the response is no longer called wrong
UNREACHABLE_STEPS = 25  # at a limit before a target can be called out of reach
# Fall of |ln(H*/H)| per step at the limit below which it is, unless the law has a figure of its own; above twice that
# it no longer is. How often that is right: docs/control.md.
STANDSTILL = 0.0015
_SEEN = 0.4  # weight of the fall seen since the limit was reached, beside the one that the law expects
_DISTINCT = 0.97  # entropies closer than this are one


class ResponseWatch(Stateful):
    """Follows |ln(H*/H)| for as long as the command pushes in one direction.

    The command pushes when it is beyond rest (``u`` = 0) in the direction of the error, or at the limit on that side.

    ``standstill``: fall of |ln(H*/H)| per step below which a command at its limit does not get there.
    """

    STATE: ClassVar = {
        "at_limit": Count,
        "direction": Literal[-1, 0, 1],
        "gaps": list[float],
        "worst": float,
        "unreachable": bool,
        "lowest": float | None,
        "highest": float | None,
    }

    def __init__(self, lower: float, upper: float, saturation_steps: int, standstill: float) -> None:
        self._lower, self._upper, self._standstill = lower, upper, standstill
        self._saturation_steps = saturation_steps
        self.at_limit = 0  # consecutive steps at the limit in the error's direction
        self.direction = 0
        self.gaps: list[float] = []
        self.worst = 0.0  # largest gap since the response was found wrong; 0: it is not
        self.unreachable = False  # the command has been at its limit for long and the entropy stands still
        self.lowest: float | None = None  # entropies seen so far, nats
        self.highest: float | None = None

    def observe(self, error: float, u: float, entropy: float, expected: float = math.nan) -> None:
        """Note one step.

        Args:
            error: ln(H*/H), positive when entropy must rise.
            u: the command.
            entropy: filtered, nats.
            expected: of ln H per step under ``u``, as the law has learnt; NaN: it has learnt nothing.
        """
        self.lowest = entropy if self.lowest is None else min(self.lowest, entropy)
        self.highest = entropy if self.highest is None else max(self.highest, entropy)
        direction = (error > 0) - (error < 0)
        limited = (direction > 0 and u >= self._upper) or (direction < 0 and u <= self._lower)
        pushing = limited or u * direction > 0
        if not pushing or direction != self.direction:
            self.gaps, self.at_limit = [], 0
        if pushing:
            self.gaps = [*self.gaps, abs(error)][-AWAY_STEPS - 1 :]
        self.direction = direction if pushing else 0
        self.at_limit = self.at_limit + 1 if limited else 0
        if not self.wrong_sign:
            self.worst = abs(error) if self._moved_away() else 0.0
        else:
            self.worst = max(self.worst, abs(error)) if abs(error) > _RECOVERED * self.worst else 0.0
        enough = 2 * self._standstill if self.unreachable else self._standstill
        long = self.at_limit >= UNREACHABLE_STEPS and not self.resting
        self.unreachable = long and self._approach(direction * expected) < enough

    @property
    def resting(self) -> bool:
        """The limit reached is rest itself (a one-sided actuator): it waits for the policy's own drift to do
        the work.
        """
        return self.at_limit > 0 and (self._lower if self.direction < 0 else self._upper) == 0

    @property
    def saturated(self) -> bool:
        """The command has been at its limit long enough to say so; at rest, only once the entropy has stopped
        moving.
        """
        if self.resting:
            return len(self.gaps) > AWAY_STEPS and self.gaps[0] - self.gaps[-1] < _AWAY_GROWTH
        return self.at_limit >= self._saturation_steps

    def reachable(self, entropy: float) -> str:
        """In words, what seems within reach of a command that is at its limit with the entropy standing still at
        ``entropy``.
        """
        if self.lowest is None or self.highest is None:
            return "unknown"
        if self.direction > 0:
            seen = self.lowest < _DISTINCT * entropy
            return f"about {self.lowest:.2g}-{entropy:.2g}" if seen else f"up to about {entropy:.2g}"
        seen = self.highest * _DISTINCT > entropy
        return f"about {entropy:.2g}-{self.highest:.2g}" if seen else f"about {entropy:.2g} and above"

    @property
    def wrong_sign(self) -> bool:
        """The entropy moved away from the target although the command pushed toward it all the time.

        So it stays until the gap has shrunk to ``_RECOVERED`` of its largest.
        """
        return self.worst > 0

    def _approach(self, expected: float) -> float:
        """Fall of the gap per step: seen since the limit was reached, by least squares, and expected by the law."""
        recent = self.gaps[-self.at_limit :]
        seen = -linear_regression(range(len(recent)), recent).slope
        return seen if math.isnan(expected) else expected + _SEEN * (seen - expected)

    def _moved_away(self) -> bool:
        if len(self.gaps) <= AWAY_STEPS:
            return False
        third = len(self.gaps) // 3
        first, middle, last = (fmean(self.gaps[k * third : (k + 1) * third]) for k in range(3))
        return self.gaps[-1] >= last > _AWAY_GAP and min(middle - first, last - middle) > _AWAY_GROWTH
