"""The schema as a flat table of dotted keys, and the search for the key that a mistyped one meant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING as MANDATORY

from pipeline.config.key import Form, Range
from pipeline.config.schema import RunConfig

_SCALARS = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("text", "texts")}


@dataclass(frozen=True)
class Key:
    """One entry of the schema."""

    name: str  # dotted
    type: Any  # a Python type; a dataclass for a section
    default: Any  # "???" where a value is mandatory; None for a section
    help: str
    is_section: bool
    choices: Mapping[str, str]  # permitted words, each with its meaning or ""
    range: Range | None  # permitted numbers
    unit: str
    form: Form | None  # what texts look like that are none of ``choices``
    path: str  # "read" or "written": a file or folder; "": none

    @property
    def type_name(self) -> str:
        """The type in words, e.g. "a list of integers"."""
        return "a section of keys" if self.is_section else _type_name(self.type)

    @property
    def free_form(self) -> bool:
        """Whether the value is a mapping with any keys."""
        return get_origin(self.type) is dict

    @property
    def limits(self) -> str:
        """Unit and range in words, e.g. "seconds, above 0"; empty where the key has neither."""
        return ", ".join(str(part) for part in (self.unit, self.range) if part)

    @property
    def words(self) -> str:
        """The choices, as in "native (in process, torch) | sglang (real server over HTTP)"; empty without any."""
        return " | ".join(f"{word} ({meaning})" if meaning else word for word, meaning in self.choices.items())

    @property
    def mandatory(self) -> bool:
        """Whether the user must give a value."""
        return isinstance(self.default, str) and self.default == MANDATORY


def _type_name(of: Any, plural: bool = False) -> str:
    if get_origin(of) is list:
        return f"{'lists' if plural else 'a list'} of {_type_name(get_args(of)[0], plural=True)}"
    if get_origin(of) is dict:
        return "a mapping"
    return "true or false" if of is bool else _SCALARS[of][plural]


@lru_cache
def schema_keys(schema: type = RunConfig) -> dict[str, Key]:
    """Every section and leaf key by dotted name, in the order of the schema (a dataclass of ``schema.key`` fields)."""
    return {key.name: key for key in _walk(schema, "")}


def leaf_keys(schema: type = RunConfig) -> dict[str, Key]:
    """Every key that takes a value, by dotted name."""
    return {name: key for name, key in schema_keys(schema).items() if not key.is_section}


def flat(config: RunConfig) -> dict[str, Any]:
    """The values of a configuration by dotted key; lists and free-form mappings stay whole."""
    return {key: attrgetter(key)(config) for key in leaf_keys()}


def free_form_key(name: str, schema: type) -> Key | None:
    """The key whose mapping ``name`` is an entry of, if there is one."""
    return next((key for key in _free_form_keys(schema) if name.startswith(f"{key.name}.")), None)


@lru_cache
def _free_form_keys(schema: type) -> tuple[Key, ...]:
    return tuple(key for key in schema_keys(schema).values() if key.free_form)


def _walk(section: Any, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for field in fields(section):
        name, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            yield Key(name, hint, None, is_section=True, **field.metadata)
            yield from _walk(hint, name + ".")
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield Key(name, hint, default, is_section=False, **field.metadata)


def nearest_keys(name: str, schema: type = RunConfig) -> list[str]:
    """The valid key(s) that ``name`` most likely meant, at most three; empty when nothing is close.

    The distance is the number of typing slips in the whole dotted name; a right last component in the wrong section
    costs one and a half, so that ``lr`` finds ``learner.optimizer.lr``. Keys at the same distance are all returned.
    """
    best = max(2.0, len(name) / 4)
    nearest: list[str] = []
    section = name.rpartition(".")[0]
    for candidate in sorted(schema_keys(schema), key=lambda key: key.rpartition(".")[0] != section):
        distance = _distance(name, candidate, best)
        if distance <= best:
            nearest = [*nearest, candidate] if distance == best else [candidate]
            best = distance
    return nearest[:3]


def one_slip(name: str, nearest: Sequence[str]) -> bool:
    """Whether ``name`` is one typing slip from one of ``nearest``, in a section of its own: ``rollout.cuts.tp``."""
    return "." in name and any(_distance(name, key, 1.0) <= 1.0 for key in nearest)


def _distance(name: str, candidate: str, limit: float) -> float:
    section, _, word = name.rpartition(".")
    right_section, _, right_word = candidate.rpartition(".")
    if section == right_section:
        return typing_slips(word, right_word, limit)
    return min(typing_slips(name, candidate, limit), typing_slips(word, right_word, limit) + 1.5)


def typing_slips(a: str, b: str, limit: float = math.inf) -> int:
    """Letters inserted, dropped, changed, or swapped with their neighbour to make ``b`` of ``a``.

    The distance is called optimal string alignment. Counting stops above ``limit``: then the result is only known to
    exceed it.
    """
    if abs(len(a) - len(b)) > limit:
        return abs(len(a) - len(b))
    before: list[int] = []
    previous = current = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        current = [i]
        for j, other in enumerate(b, start=1):
            best = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before[j - 2] + 1)
            current.append(best)
        if min(previous) > limit and min(current) > limit:
            break
        before, previous = previous, current
    return current[-1]
