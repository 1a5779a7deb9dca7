"""The default law: proportional-integral control of ln H.

Under GRPO ln H drifts down and integrates what the actuator does, so a proportional law alone (SCOPE-RL v7's) settles
off target and a two-point law (AEPO's) swings around it; the integral term carries the drift.
"""

from __future__ import annotations

import math

from pipeline.entropy.state import Stateful

MAX_ERROR = 1.0  # |ln(H*/H)| beyond which the law pushes no harder
_CLOSED_LOOP_STEPS = 4.0  # time constant aimed at, steps


class PiLaw(Stateful):
    """u = clip(kp e + I + ki e) with e = clip(ln(H*/H), -1, 1) and conditional integration.

    The integral does not grow while the command is held back, by a limit or the slew rate, in the direction of the
    error (no windup). With rollouts ``s`` updates old the loop's dead time grows from 1 to 1 + s, so the gains shrink
    as Kp ~ 1 / (tc + theta) and Ki ~ Kp / (tc + theta) ask (internal model control, tc = 4).

    Args:
        kp: ``u`` per unit of ln H. ki: the same, per step.
        lower, upper: limits of ``u``; 0 lies between them.
        slew: largest change of ``u`` per step; 0: unlimited.
        dead_band: |ln(H*/H)| that counts as 0; beyond it the error is measured from its edge, without a jump.
    """

    STATE = ("integral",)

    def __init__(
        self, kp: float, ki: float, lower: float, upper: float, *, slew: float = 0.0, dead_band: float = 0.0
    ) -> None:
        self._kp, self._ki = kp, ki
        self._lower, self._upper = lower, upper
        self._slew = slew
        self._dead_band = dead_band
        self.integral = 0.0

    def propose(self, entropy: float, goal: float, last: float, staleness: int) -> float:
        """See ``Law``."""
        error = self._error(entropy, goal)
        slower = (_CLOSED_LOOP_STEPS + 1) / (_CLOSED_LOOP_STEPS + 1 + staleness)
        kp, ki = self._kp * slower, self._ki * slower**2
        wanted = kp * error + self.integral + ki * error
        u = min(max(wanted, self._lower), self._upper)
        if self._slew:
            u = min(max(u, last - self._slew), last + self._slew)
        if (wanted - u) * error <= 0:
            self.integral = min(max(self.integral + ki * error, self._lower), self._upper)
        return u

    def forget(self) -> None:
        """See ``Law``."""
        self.integral = min(self.integral, 0.0)

    def _error(self, entropy: float, goal: float) -> float:
        error = math.log(goal / entropy)
        if abs(error) <= self._dead_band:
            return 0.0
        error -= math.copysign(self._dead_band, error)
        return min(max(error, -MAX_ERROR), MAX_ERROR)
