"""The errors of a bad configuration: each names the key, its value, what is wrong, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str  # dotted key, e.g. "entropy.band.low"
    value: Any  # as given; None where the value is missing
    problem: str  # what is wrong, one sentence
    remedy: str  # what to change, one sentence
    source: str = ""  # where the value came from: a file, "command line", or "" for a default or a combination

    def render(self) -> str:
        """The problem as a readable block of three lines."""
        origin = f"   ({self.source})" if self.source else ""
        return f"  {self.key}: {self.value!r}{origin}\n    problem: {self.problem}\n    remedy:  {self.remedy}"


class ConfigError(ValueError):
    """A configuration that must not be run. Holds every problem found; its text is one block that shows them all."""

    def __init__(self, key: str, value: Any, problem: str, remedy: str, source: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(key, value, problem, remedy, source),)
        super().__init__(self.render())

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> ConfigError:
        """One error for several problems (at least one), in the order given."""
        first = problems[0]
        error = cls(first.key, first.value, first.problem, first.remedy, first.source)
        error.problems = tuple(problems)
        error.args = (error.render(),)
        return error

    def render(self) -> str:
        """All problems as one block."""
        count = len(self.problems)
        head = "configuration error" if count == 1 else f"{count} configuration errors"
        return "\n".join([head, *(problem.render() for problem in self.problems)])
