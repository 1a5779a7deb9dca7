"""Open-loop excitation: a command that switches between two levels, so that its effect on the entropy can be told from
the drift.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import actuator_of
from pipeline.entropy.gains import CLOSED_LOOP_STEPS, DEAD_TIME
from pipeline.entropy.state import Count, Stateful
from pipeline.types import ControlDecision, EntropyReading

PERIOD = 20  # steps at one level; a square wave late by a whole level is its own opposite, so above any delay
_PUSH = 0.02  # of ln H per step between the levels, on a plant of the gain that the default kp was made for
_SHARE = 0.9  # of the range between the limits, at most


class Excitation(Stateful):
    """An ``EntropyController`` that takes no notice of the entropy: ``PERIOD`` steps high, as many low, and so on."""

    STATE: ClassVar = {"steps": Count}

    def __init__(self, config: EntropyConfig) -> None:
        self._actuator = actuator_of(config)
        self._prompts = config.auxiliary_prompts if self._actuator.second_rollout else 0
        low, high = self._actuator.to_u(self._actuator.lower), self._actuator.to_u(self._actuator.upper)
        span = min(_PUSH * (CLOSED_LOOP_STEPS + DEAD_TIME) * self._actuator.kp, _SHARE * (high - low))
        start = max(low, -span / 2)
        self.levels = (start + span, start)
        self.steps = 0

    def initial(self) -> ControlDecision:
        """See ``EntropyController``."""
        return self._decision()

    def update(self, reading: EntropyReading, positives: int) -> ControlDecision:
        """See ``EntropyController``."""
        self.steps += 1
        return self._decision(reading.mean)

    def _decision(self, entropy: float = math.nan) -> ControlDecision:
        u = self.levels[self.steps // PERIOD % 2]
        command = self._actuator.to_command(u)
        return ControlDecision(
            command=command,
            temperature=command if self._actuator.temperature else 1.0,
            auxiliary_prompts=self._prompts,
            state="tracking",
            reason="excitation",
            filtered_entropy=entropy,
        )
