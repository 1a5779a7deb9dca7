"""A user's own function as a verifier."""

from __future__ import annotations

from collections.abc import Callable

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
        """Whatever the function says."""
        return float(self._function(prompt, text))
