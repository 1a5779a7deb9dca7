"""``pi``, the default law: proportional control of ln H, plus an integral that a predictor feeds, with a gain that it
learns.

Under GRPO ln H drifts down and integrates what the actuator does, so a proportional law alone (SCOPE-RL v7's) settles
off target and a two-point law (AEPO's) swings around it; the integral carries the drift. Ours, derived and measured
here (docs/control.md). Keys: ``entropy.pi``. The rows of the table are in the actuators' files, one each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import PACKAGE, Actuator, command_limits
from pipeline.entropy.band import SetPoint
from pipeline.entropy.gains import CLOSED_LOOP_STEPS, DEAD_TIME, MOMENTUM_STEPS
from pipeline.entropy.law import ANY, Course, Law, Loop
from pipeline.entropy.observer import DELAYS, MISSED, RATIOS, SPREAD, WIDE_RATIOS, PlantObserver
from pipeline.entropy.sensor import HAMPEL_WINDOW, Sensor
from pipeline.entropy.state import Stateful
from pipeline.registry import names

MADE_FOR = names(PACKAGE)  # any
REMEMBERED = 64  # commands: more than any delay
MAX_ERROR = 1.0  # |ln(H*/H)| beyond which the law pushes no harder


@dataclass(frozen=True)
class Pace:
    """How fast the law may be, given how much a reading varies."""

    horizon: float  # time constant plus dead time, steps
    trend: float | None  # the observer's l2; None: ki / (kp (tc + theta))
    missed: float  # root mean square of what a prediction misses, in ln H, before any reading
    spread: float  # standard deviation of ln(gain / assumed) before any reading
    ratios: tuple[float, ...]  # gains considered, of the one assumed
    standstill: float  # see ``Law``


NOISY = Pace(CLOSED_LOOP_STEPS + DEAD_TIME, None, MISSED, SPREAD, RATIOS, 0.002)
# With repeated readings: no filter to wait for, half the time constant, and weak gains are soon told.
QUIET = Pace(8.0 + 1 + MOMENTUM_STEPS, 0.01, 0.01, 1.2, WIDE_RATIOS, 0.001)


class PiLaw(Law):
    """u = clip((e / (tc + theta) + s - d) / b), e = clip(ln H* - z, -1, 1), with z, d and b from ``PlantObserver``.

    z is where ln H goes with the commands that were sent already: momentum delays what they do (Smith 1957, Chem. Eng.
    Progress 53). s is the slope of ln H* where a schedule moves the band: without it the entropy would follow s (tc +
    theta) behind. So kp = 1 / (b (tc + theta)), and -d / b, the command that holds the entropy against its drift, is
    the integral. It is assumed at first that b = 1 / (kp (tc + theta)), the plant that kp was chosen for; what the
    command does tells more. The observer's gains are l2 = ki b and l1 = 2 sqrt(l2), critically damped. Since it is told
    the command as limited, the integral neither winds up at a limit nor waits for the target to learn the drift; and a
    prediction passes less of the readings' noise on to the command than a filter of the same delay. Rollouts that are
    ``s`` updates old, as measured at this step, delay u' by s more. Over the first 12 readings nothing is pushed down,
    unless the drift is known: what falls by itself would be pushed through its band.

    Args:
        kp: ``u`` per unit of ln H. ki: the same, per step, of what the prediction missed.
        lower, upper: limits of ``u``; 0 lies between them.
        adapt: learn b, among the pace's multiples of the one assumed, and how late the answer comes.
        slew: largest change of ``u`` per step; 0: unlimited.
        dead_band: |e| that counts as 0; beyond it the error is measured from its edge, without a jump.
        pace: ``QUIET`` where readings are repeated; it has an l2 of its own, whatever ki is, but 0.
    """

    STATE: ClassVar = {"sent": list[float]}

    def __init__(
        self,
        kp: float,
        ki: float,
        lower: float,
        upper: float,
        *,
        adapt: bool = True,
        slew: float = 0.0,
        dead_band: float = 0.0,
        pace: Pace = NOISY,
    ) -> None:
        assumed = 1 / (kp * (CLOSED_LOOP_STEPS + DEAD_TIME))
        trend = ki * assumed if pace.trend is None or ki == 0 else pace.trend
        level = min(1.0, 2 * math.sqrt(trend)) or 1.0  # without an integral: the reading itself
        ratios = pace.ratios if adapt else (1.0,)
        self.plant = PlantObserver(assumed, level, trend, (lower, upper), ratios, pace.spread, pace.missed)
        self._horizon, self._standstill = pace.horizon, pace.standstill
        self._lower, self._upper = lower, upper
        self._slew = slew
        self._dead_band = dead_band
        self.sent: list[float] = []  # commands in force, oldest first

    @property
    def gain(self) -> float:
        """See ``Law``."""
        return self.plant.gain

    @property
    def standstill(self) -> float:
        """See ``Law``."""
        return self._standstill

    def expected(self, u: float) -> float:
        """See ``Law``."""
        return self.plant.expected(u)

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        self.sent = [*self.sent, last][-REMEMBERED:]
        ages = [1 + staleness + delay for delay in DELAYS]
        self.plant.observe(math.log(entropy), [self._sent_ago(age) for age in ages])
        ahead = self.plant.ahead([self._sent_since(age) for age in ages], 1 + staleness, course.slope)
        error = self._error(math.log(goal) - ahead)
        drift = self.plant.drift_at(math.log(goal))
        u = (error / self._horizon + course.slope - drift) / self.plant.gain
        u = min(max(u, 0.0 if self.plant.may_fall else self._lower), self._upper)
        return min(max(u, last - self._slew), last + self._slew) if self._slew else u

    def forget(self) -> None:
        """See ``Law``."""
        self.plant.forget_fall()

    def parts(self) -> dict[str, Stateful]:
        """See ``Stateful``."""
        return {"plant": self.plant}

    def _sent_ago(self, steps: float) -> float:
        """The command in force so many steps ago; between two steps a mean, before the first the first."""
        whole = math.floor(steps)
        late, early = (self.sent[max(0, len(self.sent) - 1 - ago)] for ago in (whole, whole + 1))
        return late + (steps - whole) * (early - late)

    def _sent_since(self, steps: float) -> float:
        """The sum of the commands after the one in force so many steps ago."""
        whole = math.floor(steps)
        return sum(self._sent_ago(ago) for ago in range(whole)) + (steps - whole) * self._sent_ago(whole)

    def _error(self, error: float) -> float:
        if abs(error) <= self._dead_band:
            return 0.0
        error -= math.copysign(self._dead_band, error)
        return min(max(error, -MAX_ERROR), MAX_ERROR)


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law with the configured gains, or the actuator's; behind a Hampel filter and an exponential mean."""
    pi = config.pi
    kp, ki = (pi.kp, pi.ki) if pi.kp else (actuator.kp, actuator.ki)
    limits = command_limits(config, (actuator.lower, actuator.upper))
    lower, upper = actuator.to_u(limits[0]), actuator.to_u(limits[1])
    pace = QUIET if config.repeated_prompts else NOISY
    law = PiLaw(kp, ki, lower, upper, adapt=pi.adapt, slew=pi.slew, dead_band=pi.dead_band, pace=pace)
    sensor = Sensor(pi.ema, HAMPEL_WINDOW, of_repeated=config.band_of == "repeated")
    return Loop(law, limits, sensor, SetPoint(pi.setpoint_ramp))
