"""The controller: a law, and the guards that decide when not to listen to it.

Guards, in the order they are asked:

- no usable reading (NaN, infinite, negative, no tokens): hold the command; after 3 steps let it decay to rest;
- no band yet (``entropy.band.schedule=auto``) and H above its floor: rest;
- explosion (H above 2.5 times the set-point for 3 steps, having been below 2): the lower limit, and say so;
- no positives: hold the command and the integral, since the actuator had nothing to act through; from the second step
  on draw more auxiliary prompts (split range), after 10 let the command decay: a temperature at which nothing is
  correct would otherwise be held for ever;
- saturation: keep the limit, draw more auxiliary prompts (split range), and say that the target is not reached;
- a response too weak or of the wrong sign for 50 steps: say so.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pipeline.entropy.actuator import Actuator
from pipeline.entropy.band import Band, SetPoint
from pipeline.entropy.law import Course, Law
from pipeline.entropy.sensor import Sensor, usable
from pipeline.entropy.state import Count, Stateful
from pipeline.entropy.watch import AWAY_STEPS, ResponseWatch
from pipeline.types import ControlDecision, EntropyReading

EXPLOSION = 2.5  # times the set-point
# times the set-point, below which the filtered H must have been before: noise on a descent from above is no explosion
WITHIN = 2.0
EXPLOSION_STEPS = 3
PATIENCE_READING = 3  # steps without a usable reading before the command decays
PATIENCE_POSITIVES = 10  # steps without positives before the command decays
DECAY = 0.8  # of u per step, toward rest
PROMPT_GROWTH = 1.5
CALM_STEPS = 15  # steps well inside the limits before auxiliary prompts are given back
_CALM_SHARE = 0.4  # of the larger limit


class ClosedLoop(Stateful):
    """An ``EntropyController`` of any law and actuator.

    Args:
        law: proposes the command ``u``.
        sensor: what the law gets to see of the readings.
        set_point: where the law is steered, on the way to the band's target.
        limits: of the command; the actuator's rest lies between them.
        prompts: auxiliary prompts, at least and at most; equal: no split range. (0, 0) for one-rollout actuators.
        saturation_steps: steps at a limit before the state is "saturated".
    """

    STATE: ClassVar = {
        "u": float,
        "prompts": Count,
        "calm": Count,
        "bad_readings": Count,
        "no_positives": Count,
        "within": bool,
        "explosion": Count,
    }

    def __init__(
        self,
        law: Law,
        actuator: Actuator,
        band: Band,
        sensor: Sensor,
        set_point: SetPoint,
        *,
        limits: tuple[float, float],
        prompts: tuple[int, int],
        saturation_steps: int,
    ) -> None:
        self._law, self._actuator, self._band = law, actuator, band
        self._sensor, self._set_point = sensor, set_point
        self._limits = limits
        self._lower, self._upper = actuator.to_u(limits[0]), actuator.to_u(limits[1])
        self._min_prompts, self._max_prompts = prompts
        self._saturation_steps = saturation_steps
        self._watch = ResponseWatch(self._lower, self._upper, saturation_steps, law.standstill)
        self.u = 0.0
        self.prompts = self._min_prompts
        self.calm = 0
        self.bad_readings = 0
        self.no_positives = 0
        self.within = False  # whether H has come down so far: a policy may start above
        self.explosion = 0

    def initial(self) -> ControlDecision:
        """See ``EntropyController``."""
        return self._decision("holding", "no reading yet", self._band.target(0))

    def update(self, reading: EntropyReading, positives: int) -> ControlDecision:
        """See ``EntropyController``. The decision is for step ``reading.step + 1`` and steers to that step's band."""
        step = reading.step + 1
        if not usable(reading):
            return self._without_reading(reading, step)
        self.bad_readings = 0
        entropy = self._sensor.filter(reading.mean, reading.repeated)
        single = self._sensor.controlled(reading)
        self._band.observe(reading.step, single)
        self.no_positives = 0 if positives > 0 else self.no_positives + 1
        # Only a second rollout is drawn with the command; the others' commands act at once, however old the rows are.
        delay = reading.staleness if self._actuator.second_rollout else 0
        course = Course(*self._band.at(step), self._band.slope(step))
        if self._band.watching and entropy > course.high:
            return self._watching(entropy, self._band.target(step), delay, course)
        goal = self._set_point.toward(self._band.target(step), entropy)
        above = single > EXPLOSION * goal
        self.within = self.within or entropy < WITHIN * goal
        self.explosion = self.explosion + 1 if above and self.within else 0
        if self.explosion >= EXPLOSION_STEPS:
            self.u = self._lower
            self._law.forget()
            reason = f"entropy explodes: H={single:.3g} above {EXPLOSION:g} x {goal:.3g} for {self.explosion} steps"
            return self._decision("exploding", reason, goal, entropy)
        if self.no_positives:
            return self._without_positives(goal, entropy)
        self.u = self._law.propose(entropy, goal, self.u, delay, course)
        self._watch.observe(math.log(goal / entropy), self.u, entropy, self._law.expected(self.u))
        self._split_range()
        state = "saturated" if self._watch.saturated else "tracking"
        return self._decision(state, self._reason(entropy, goal, step), goal, entropy)

    def parts(self) -> dict[str, Stateful]:
        """See ``Stateful``."""
        return {
            "law": self._law,
            "sensor": self._sensor,
            "set_point": self._set_point,
            "watch": self._watch,
            "band": self._band,
        }

    def _watching(self, entropy: float, floor: float, delay: float, course: Course) -> ControlDecision:
        """Nothing acts above a band that is still to be found, and no entropy is too high; the law learns the plant."""
        if not self.no_positives:
            self._law.propose(entropy, floor, self.u, delay, course)
        self.u = 0.0
        self.within, self.explosion = False, 0
        self._set_point.forget()
        reason = f"H={entropy:.3g}; no band yet: pass@k is watched as the entropy falls"
        return self._decision("holding", reason, floor, entropy)

    def _without_reading(self, reading: EntropyReading, step: int) -> ControlDecision:
        self.bad_readings += 1
        if self.bad_readings > PATIENCE_READING:
            self.u *= DECAY
        reason = (
            f"no usable entropy reading for {self.bad_readings} step{'s' * (self.bad_readings != 1)}: "
            f"{reading.mean} over {reading.count:g} tokens"
        )
        return self._decision("holding", reason, self._band.target(step))

    def _without_positives(self, goal: float, entropy: float) -> ControlDecision:
        if self.no_positives >= 2:
            self._more_prompts()
        if self.no_positives > PATIENCE_POSITIVES:
            self.u *= DECAY
        return self._decision(
            "holding", f"no positives for {self.no_positives} step{'s' * (self.no_positives != 1)}", goal, entropy
        )

    def _split_range(self) -> None:
        """Distinct prompts carry what the command no longer can."""
        at_limit = self._watch.at_limit
        if at_limit and at_limit % self._saturation_steps == 0:
            self._more_prompts()
        self.calm = self.calm + 1 if abs(self.u) < _CALM_SHARE * max(self._upper, -self._lower) else 0
        if self.calm >= CALM_STEPS:
            self.prompts = max(self._min_prompts, int(self.prompts / PROMPT_GROWTH))
            self.calm = 0

    def _more_prompts(self) -> None:
        self.prompts = min(self._max_prompts, math.ceil(self.prompts * PROMPT_GROWTH))

    def _reason(self, entropy: float, goal: float, step: int) -> str:
        low, high = self._band.at(step)
        where = "in band" if low <= entropy <= high else "below the band" if entropy < low else "above the band"
        reason = f"H={entropy:.3g} {where}"
        if self._watch.resting:
            reason += "; the actuator rests and waits for the policy's own drift"
        if self._watch.saturated and where != "in band":
            stands = self._watch.unreachable or self._watch.resting
            reason = f"at its limit for {self._watch.at_limit} steps, H={entropy:.3g} on its way to {goal:.3g}"
            if stands:
                reason = f"target {self._band.target(step):.3g} not reachable: held at H={entropy:.3g}; "
                reason += f"reachable {self._watch.reachable(entropy)}"
        return reason

    def _decision(self, state: str, reason: str, goal: float, entropy: float = math.nan) -> ControlDecision:
        if self._watch.wrong_sign:
            reason += (
                f"; H moved away from the target in {AWAY_STEPS} steps of pushing toward it: "
                "the actuator is too weak here or acts with the wrong sign"
            )
        command = min(max(self._actuator.to_command(self.u), self._limits[0]), self._limits[1])
        return ControlDecision(
            command=command,
            temperature=command if self._actuator.temperature else 1.0,
            auxiliary_prompts=self.prompts,
            state=state,
            reason=reason,
            target=goal,
            filtered_entropy=entropy,
            gain=self._law.gain,
        )
