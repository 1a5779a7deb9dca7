"""Reads checked values out of a ``config.json`` and collects every reason why a model cannot be used. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """One reason why a model cannot be used."""

    problem: str  # what is wrong, one sentence
    remedy: str  # what to do, one sentence


class ModelError(ValueError):
    """A model, or a folder of one, that cannot be used. Holds every refusal found; its text shows them all."""

    def __init__(self, refusals: Sequence[Refusal], where: str = "") -> None:
        """``where``: the folder or file that is refused."""
        super().__init__(refusals, where)
        self.refusals = tuple(refusals)
        self.where = where

    def __str__(self) -> str:
        text = "; ".join(f"{refusal.problem}: {refusal.remedy}" for refusal in self.refusals)
        return f"{self.where}: {text}" if self.where else text


@dataclass(frozen=True)
class Fixed:
    """A key of ``config.json`` of which one value alone is built."""

    key: str
    value: Any
    why: str
    absent: Any = ...  # what transformers takes where the key is absent; ...: ``value``

    def refusal(self, config: Mapping[str, Any]) -> Refusal | None:
        """Why ``config`` is refused, or ``None``."""
        given = config.get(self.key, self.value if self.absent is ... else self.absent)
        if given == self.value:
            return None
        said = f"{self.key}={given!r}"
        if self.key not in config:
            said = f"{self.key}, which is absent and then {given!r},"
        wanted = "null" if self.value is None else repr(self.value)
        return Refusal(
            f"config.json: {said} is not supported: {self.why}", f"use a model in which {self.key} is {wanted}"
        )


class Said:
    """A ``config.json`` while it is read: hands out checked values and collects every refusal."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._missing: list[str] = []
        self._refusals: list[Refusal] = []

    def refuse(self, problem: str, remedy: str = "restore the model folder") -> None:
        """Note a refusal; ``check`` raises it."""
        self._refusals.append(Refusal(f"config.json: {problem}", remedy))

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; where it is absent or null ``default``, or a refusal."""
        value = self.config.get(key)
        if value is None:
            if default is None:
                self._missing.append(key)
            return least if default is None else default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(f"{key}={value!r} is not a whole number of at least {least}")
            return least
        return value

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value: Any = self.config.get(key)
        if positive(value):
            return float(value)
        if value is None:
            self._missing.append(key)
        else:
            self.refuse(f"{key}={value!r} is not a number above 0")
        return 1.0

    def quote(self, key: str, default: Any) -> str:
        """A key as ``config.json`` has it, or what its absence means."""
        return f"{key}={self.config[key]!r}" if key in self.config else f"{key} (absent, so {default!r})"

    def fixed(self, rules: Sequence[Fixed]) -> None:
        """Refuse every value that is not the one that is built."""
        self._refusals += [refusal for rule in rules if (refusal := rule.refusal(self.config))]

    def check(self) -> None:
        """Raise ``ModelError`` if anything was refused."""
        if self._missing:
            said = Refusal(f"config.json does not say {', '.join(self._missing)}", "restore the model folder")
            self._refusals.append(said)
        if self._refusals:
            raise ModelError(self._refusals)


def positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
