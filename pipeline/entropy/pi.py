"""The default law: proportional control of ln H, plus an integral that a predictor of ln H feeds.

Under GRPO ln H drifts down and integrates what the actuator does, so a proportional law alone (SCOPE-RL v7's) settles
off target and a two-point law (AEPO's) swings around it; the integral carries the drift.
"""

from __future__ import annotations

import math

from pipeline.entropy.law import ANY, Edges
from pipeline.entropy.state import Stateful

MAX_ERROR = 1.0  # |ln(H*/H)| beyond which the law pushes no harder
MOMENTUM_STEPS = 3  # by which the optimizer's momentum delays what a command does
# Dead time of the loop without stale rollouts: the decision's own step, momentum, and the mean age of an EMA of weight 0.7.
DEAD_TIME = 1 + MOMENTUM_STEPS + 2
CLOSED_LOOP_STEPS = 16.0  # time constant aimed at
KI_PER_KP = 0.05  # of the defaults, and of what ``calibrate`` proposes


def proportional_gain(gain: float, staleness: int = 0) -> float:
    """Kp for a plant that moves ln H by ``gain`` per unit of u and step: 1 / (gain (tc + dead time)), internal model control."""
    return 1 / (gain * (CLOSED_LOOP_STEPS + DEAD_TIME + staleness))


class PiLaw(Stateful):
    """u = clip(kp e + I) with e = clip(ln H* - y, -1, 1), y a prediction of ln H that every reading corrects.

    With b = 1 / (kp (tc + theta)), the plant gain that kp was chosen for, and u' the command that acted on this reading:

        y <- y + b (u' - I) + l1 r,    r = ln H - (y + b (u' - I)),    I <- clip(I - ki r)

    and l1 = 2 sqrt(ki b), a critically damped observer. -b I is its estimate of the drift, so at rest e = 0. Since it
    is told the command as limited, the integral neither winds up at a limit nor waits for the target to learn the drift; and a
    prediction passes less of the readings' noise on to the command than a filter of the same delay. Rollouts ``s`` updates old delay u'
    by s more, and kp shrinks by (tc + theta) / (tc + theta + s).

    Args:
        kp: ``u`` per unit of ln H. ki: the same, per step, of what the prediction missed.
        lower, upper: limits of ``u``; 0 lies between them.
        slew: largest change of ``u`` per step; 0: unlimited.
        dead_band: |e| that counts as 0; beyond it the error is measured from its edge, without a jump.
    """

    STATE = ("integral", "predicted", "sent")

    def __init__(
        self, kp: float, ki: float, lower: float, upper: float, *, slew: float = 0.0, dead_band: float = 0.0
    ) -> None:
        self._kp, self._ki = kp, ki
        self._gain = 1 / (kp * (CLOSED_LOOP_STEPS + DEAD_TIME))
        self._correction = min(1.0, 2 * math.sqrt(ki * self._gain)) or 1.0  # without an integral: the reading itself
        self._lower, self._upper = lower, upper
        self._slew = slew
        self._dead_band = dead_band
        self.integral = 0.0
        self.predicted: float | None = None  # ln H; None: no reading yet
        self.sent: list[float] = []  # commands in force, oldest first

    def propose(self, entropy: float, goal: float, last: float, staleness: int, edges: Edges = ANY) -> float:
        """See ``Law``."""
        self.sent = [*self.sent, last][-(2 + MOMENTUM_STEPS + staleness) :]
        self._observe(math.log(entropy), self.sent[0])
        assert self.predicted is not None  # _observe saw to it
        error = self._error(math.log(goal) - self.predicted)
        loop = CLOSED_LOOP_STEPS + DEAD_TIME
        u = self._kp * loop / (loop + staleness) * error + self.integral
        u = min(max(u, self._lower), self._upper)
        return min(max(u, last - self._slew), last + self._slew) if self._slew else u

    def forget(self) -> None:
        """See ``Law``."""
        self.integral = min(self.integral, 0.0)

    def _observe(self, reading: float, acted: float) -> None:
        if self.predicted is None:
            self.predicted = reading
            return
        predicted = self.predicted + self._gain * (acted - self.integral)
        missed = reading - predicted
        self.predicted = predicted + self._correction * missed
        self.integral = min(max(self.integral - self._ki * missed, self._lower), self._upper)

    def _error(self, error: float) -> float:
        if abs(error) <= self._dead_band:
            return 0.0
        error -= math.copysign(self._dead_band, error)
        return min(max(error, -MAX_ERROR), MAX_ERROR)
