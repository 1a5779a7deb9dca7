"""A user's own function as a verifier."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import SupportsFloat

from pipeline.rewards.own_function import returned
from pipeline.types import Prompt


class NoRewardError(TypeError):
    """The function returned no number; the text says what, and where the function is."""


class Verifier:
    """A user's own function. ``name`` is what the configuration calls it."""

    def __init__(self, name: str, function: Callable[[Prompt, str], float]) -> None:
        self._name, self._function = name, function

    @staticmethod
    def extract(text: str) -> str | None:
        """The whole response: what the function reads in it is its own affair."""
        return text or None

    def refusal(self, prompt: Prompt) -> str:
        """Nothing: what a reference must be, the function alone knows."""
        return ""

    def score(self, prompt: Prompt, text: str) -> float:
        """The number that the function returns, numpy's and torch's too. Raises ``NoRewardError`` where it is none."""
        given: object = self._function(prompt, text)
        with suppress(TypeError, ValueError, RuntimeError):  # an array of several numbers, text in an array
            if isinstance(given, SupportsFloat):
                return float(given)
        raise NoRewardError(returned(self._name, self._function, given, "a number in [0, 1]"))
