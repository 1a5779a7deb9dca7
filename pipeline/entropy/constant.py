"""No loop: the actuator's command stays what the configuration says, as a fixed entropy bonus has it."""

from __future__ import annotations

from pipeline.entropy.actuators import Actuator
from pipeline.entropy.state import Stateful
from pipeline.types import ControlDecision, EntropyReading


class ConstantCommand(Stateful):
    """An ``EntropyController`` that never changes its mind.

    Args:
        command: in the actuator's unit.
        prompts: auxiliary prompts of every step; 0 for one-rollout actuators.
    """

    def __init__(self, actuator: Actuator, command: float, prompts: int) -> None:
        temperature = command if actuator.temperature else 1.0
        self._given = command, temperature, prompts, "holding", "constant command"

    def initial(self) -> ControlDecision:
        """See ``EntropyController``."""
        return ControlDecision(*self._given)

    def update(self, reading: EntropyReading, positives: int) -> ControlDecision:
        """See ``EntropyController``."""
        return ControlDecision(*self._given, filtered_entropy=reading.mean)
