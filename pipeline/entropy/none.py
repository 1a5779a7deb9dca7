"""No control: plain GRPO, with the entropy reported all the same."""

from __future__ import annotations

from pipeline.entropy.state import Stateful
from pipeline.types import ControlDecision, EntropyReading


class NoControl(Stateful):
    """An ``EntropyController`` that asks for nothing."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def initial(self) -> ControlDecision:
        """See ``EntropyController``."""
        return ControlDecision(1.0, 1.0, 0, "off", self._reason)

    def update(self, reading: EntropyReading, positives: int) -> ControlDecision:
        """See ``EntropyController``."""
        return ControlDecision(1.0, 1.0, 0, "off", self._reason, filtered_entropy=reading.mean)
