"""Is the command at its limit, and does the entropy answer it?"""

from __future__ import annotations

from statistics import fmean

from pipeline.entropy.state import Stateful

AWAY_STEPS = 50  # of pushing before a response of the wrong sign is called one
_AWAY_GAP = 0.1  # |ln(H*/H)| by then, and its growth from each third of those steps to the next: an integral that
_AWAY_GROWTH = 0.02  # still gathers itself against the drift reaches neither
_RECOVERED = 0.7  # of its largest gap: once this is reached, the response is no longer called wrong
_TREND_STEPS = 20
_TREND = 0.003  # fall of |ln(H*/H)| per step that counts as approaching (measured drift of GRPO)


class ResponseWatch(Stateful):
    """Follows |ln(H*/H)| for as long as the command pushes in one direction.

    The command pushes when it is beyond rest (``u`` = 0) in the direction of the error, or at the limit on that side.
    """

    STATE = ("at_limit", "direction", "gaps", "worst")

    def __init__(self, lower: float, upper: float, saturation_steps: int) -> None:
        self._lower, self._upper = lower, upper
        self._saturation_steps = saturation_steps
        self.at_limit = 0  # consecutive steps at the limit in the error's direction
        self.direction = 0
        self.gaps: list[float] = []
        self.worst = 0.0  # largest gap since the response was found wrong; 0: it is not

    def observe(self, error: float, u: float) -> None:
        """Note one step. ``error``: ln(H*/H), positive when entropy must rise."""
        direction = (error > 0) - (error < 0)
        limited = (direction > 0 and u >= self._upper) or (direction < 0 and u <= self._lower)
        pushing = limited or u * direction > 0
        if not pushing or direction != self.direction:
            self.gaps = []
        if pushing:
            self.gaps = [*self.gaps, abs(error)][-AWAY_STEPS - 1 :]
        self.direction = direction if pushing else 0
        self.at_limit = self.at_limit + 1 if limited else 0
        if not self.wrong_sign:
            self.worst = abs(error) if self._moved_away() else 0.0
        else:
            self.worst = max(self.worst, abs(error)) if abs(error) > _RECOVERED * self.worst else 0.0

    @property
    def resting(self) -> bool:
        """The limit reached is rest itself (a one-sided actuator): it waits for the policy's own drift to do the work."""
        return self.at_limit > 0 and (self._lower if self.direction < 0 else self._upper) == 0

    @property
    def saturated(self) -> bool:
        """The command has been at its limit long enough to say so; at rest, only once the entropy has stopped moving."""
        if self.resting:
            return len(self.gaps) > AWAY_STEPS and self.gaps[0] - self.gaps[-1] < _AWAY_GROWTH
        return self.at_limit >= self._saturation_steps

    @property
    def approaching(self) -> bool:
        """The entropy is on its way to the target."""
        recent = self.gaps[-_TREND_STEPS - 1 :]
        return len(recent) > 1 and recent[0] - recent[-1] > _TREND * (len(recent) - 1)

    @property
    def wrong_sign(self) -> bool:
        """The entropy moved away from the target although the command pushed toward it all the time.

        So it stays until the gap has shrunk to ``_RECOVERED`` of its largest.
        """
        return self.worst > 0

    def _moved_away(self) -> bool:
        if len(self.gaps) <= AWAY_STEPS:
            return False
        third = len(self.gaps) // 3
        first, middle, last = (fmean(self.gaps[k * third : (k + 1) * third]) for k in range(3))
        return self.gaps[-1] >= last > _AWAY_GAP and min(middle - first, last - middle) > _AWAY_GROWTH
