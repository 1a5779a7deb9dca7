"""A user's own function as a verifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsFloat

from pipeline.types import Prompt


class Verifier:
    """A user's own function."""

    def __init__(self, function: Callable[[Prompt, str], float]) -> None:
        self._function = function

    @staticmethod
    def extract(text: str) -> str | None:
        """The whole response: what the function reads in it is its own affair."""
        return text or None

    def refusal(self, prompt: Prompt) -> str:
        """Nothing: what a reference must be, the function alone knows."""
        return ""

    def score(self, prompt: Prompt, text: str) -> float:
        """The number that the function returns, one of numpy or torch too. Raises ``TypeError`` where it is none."""
        given: object = self._function(prompt, text)
        if not isinstance(given, SupportsFloat):
            raise TypeError(f"the verifier gave a {type(given).__name__} as reward: give a number in [0, 1]")
        return float(given)
