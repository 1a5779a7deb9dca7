"""A user's own function as a verifier."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.types import Prompt


class Verifier:
    """A user's own function."""

    def __init__(self, function: Callable[[Prompt, str], float]) -> None:
        self._function = function

    def score(self, prompt: Prompt, text: str) -> float:
        """Whatever the function says."""
        return float(self._function(prompt, text))
