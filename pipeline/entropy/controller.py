"""The contract of an entropy controller."""

from __future__ import annotations

from typing import Any, Protocol

from pipeline.types import ControlDecision, EntropyReading


class EntropyController(Protocol):
    """Turns entropy readings into actuator commands; one ``update`` per training step.

    ``initial`` is the decision for the first step, before any reading (temperature 1). All state is in ``state_dict``.
    """

    def initial(self) -> ControlDecision:
        """The decision for step 0: no reading yet, so T = 1."""

    def update(self, reading: EntropyReading, positives: int) -> ControlDecision:
        """Decide for the next step. ``positives``: correct rows the actuator consumed in the step just done."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
