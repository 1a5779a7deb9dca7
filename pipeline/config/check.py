"""Checks each value of a configuration against the constraints of its own key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.key import ANY, MOST
from pipeline.config.keys import Key, leaf_keys


def key_problems(config: Any) -> Iterator[Problem]:
    """Every value of ``config``, a dataclass of ``key.key`` fields of any schema, that its key does not permit."""
    for key in leaf_keys(type(config)).values():
        value: Any = config
        for part in key.name.split("."):
            value = getattr(value, part)
        for entry in _entries(value):
            yield from _of_text(key, entry) if isinstance(entry, str) else _of_number(key, entry)


def _entries(value: Any) -> Iterator[str | float]:
    """The words and numbers of a value, those of lists in lists too; none of what is free-form."""
    if isinstance(value, list):
        for entry in value:
            yield from _entries(entry)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield value


def _of_text(key: Key, value: str) -> Iterator[Problem]:
    choices, form = list(key.choices), key.form
    if value in choices or (form and re.fullmatch(form.pattern, value)) or not (choices or form):
        return
    nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    said = [f"not one of {', '.join(choices)}"] if choices else []
    said += [form.problem] if form else []
    otherwise = form.remedy if form else f"choose one of {', '.join(choices)}"
    remedy = f"did you mean {nearest[0]!r}?" if nearest else otherwise
    yield Problem(key.name, value, ", ".join(said), remedy)


def _of_number(key: Key, value: float) -> Iterator[Problem]:
    permitted = key.range or ANY
    if isinstance(value, int) and permitted.high == math.inf and value > MOST:
        permitted = replace(permitted, high=MOST)
    if value not in permitted:
        problem = "out of range" if abs(value) < math.inf else "not a finite number"
        remedy = "give a finite number" if permitted is ANY else f"give a number {permitted}"
        yield Problem(key.name, value, problem, remedy)
