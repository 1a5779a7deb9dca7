"""The schema as a flat table of dotted keys, and the search for the key that a mistyped one meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, get_type_hints

from omegaconf import MISSING as MANDATORY

from pipeline.config.schema import RunConfig

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of integers",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    list[list[float]]: "a list of lists of numbers",
    dict[str, Any]: "a mapping",
}


@dataclass(frozen=True)
class Key:
    """One entry of the schema."""

    name: str  # dotted
    type: Any  # a Python type; a dataclass for a section
    default: Any  # "???" where a value is mandatory; None for a section
    help: str
    is_section: bool

    @property
    def type_name(self) -> str:
        """The type in words, e.g. "a list of integers"."""
        return "a section of keys" if self.is_section else _TYPE_NAMES[self.type]

    @property
    def mandatory(self) -> bool:
        """Whether the user must give a value."""
        return isinstance(self.default, str) and self.default == MANDATORY


@lru_cache(maxsize=1)
def schema_keys() -> dict[str, Key]:
    """Every section and leaf key by dotted name, in the order of the schema."""
    return {key.name: key for key in _walk(RunConfig, "")}


def leaf_keys() -> dict[str, Key]:
    """Every key that takes a value, by dotted name."""
    return {name: key for name, key in schema_keys().items() if not key.is_section}


def _walk(section: Any, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for field in fields(section):
        name, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            yield Key(name, hint, None, field.metadata["help"], True)
            yield from _walk(hint, name + ".")
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield Key(name, hint, default, field.metadata["help"], False)


def nearest_keys(name: str) -> list[str]:
    """The valid key(s) that ``name`` most likely meant, at most three; empty when nothing is close.

    The distance is the number of typing slips in the whole dotted name; a right last component in the wrong section
    costs one and a half, so that ``lr`` finds ``learner.optimizer.lr``. Keys at the same distance are all returned.
    """
    distances = {candidate: _distance(name, candidate) for candidate in schema_keys()}
    best = min(distances.values())
    if best > max(2.0, len(name) / 4):
        return []
    return [candidate for candidate, distance in distances.items() if distance == best][:3]


def _distance(name: str, candidate: str) -> float:
    misplaced = typing_slips(name.rpartition(".")[2], candidate.rpartition(".")[2]) + 1.5
    return min(float(typing_slips(name, candidate)), misplaced)


def typing_slips(a: str, b: str) -> int:
    """Letters inserted, dropped, changed, or swapped with their neighbour to make ``b`` of ``a`` (optimal string alignment)."""
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        current = [i]
        for j, other in enumerate(b, start=1):
            best = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before[j - 2] + 1)
            current.append(best)
        before, previous = previous, current
    return previous[-1]
