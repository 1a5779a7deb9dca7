"""The controller that closes no loop: its command stays as given, whatever the entropy."""

from __future__ import annotations

from dataclasses import replace

from pipeline.entropy.state import Stateful
from pipeline.types import ControlDecision, EntropyReading


class HeldCommand(Stateful):
    """An ``EntropyController`` that decides the same at every step; the entropy is reported all the same."""

    def __init__(self, decision: ControlDecision) -> None:
        self._decision = decision

    def initial(self) -> ControlDecision:
        """See ``EntropyController``."""
        return self._decision

    def update(self, reading: EntropyReading, positives: int) -> ControlDecision:
        """See ``EntropyController``."""
        return replace(self._decision, filtered_entropy=reading.mean)
