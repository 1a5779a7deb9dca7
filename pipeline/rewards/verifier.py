"""A verifier by its name: a file of ``verifiers``, or a user's own function.

A name of the form ``module:attribute`` is a user's own function ``(prompt, text) -> float``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from functools import cache, lru_cache
from typing import Protocol, cast

from pipeline.data import DataError
from pipeline.registry import load, names
from pipeline.rewards.verifiers import _function
from pipeline.types import Prompt

_PACKAGE = "pipeline.rewards.verifiers"


class UnknownVerifierError(DataError):
    """No verifier has this name; the message gives the nearest one."""


class Verifier(Protocol):
    """Judges one response. May raise or hang: ``VerifierStage`` then marks the sample."""

    def score(self, prompt: Prompt, text: str) -> float:
        """Reward in [0, 1]; exactly 1 means correct."""

    def extract(self, text: str) -> str | None:
        """What the response answers, as it is written there; None where it answers nothing."""

    def refusal(self, prompt: Prompt) -> str:
        """Why no response could match the prompt's reference answer, with the remedy; "" where one can."""


def check_verifier(name: str) -> None:
    """Raise ``UnknownVerifierError`` unless ``name`` is a file, or ``module:attribute`` with a findable module."""
    if name in names(_PACKAGE):
        return
    module, colon, attribute = name.partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, names(_PACKAGE), n=1, cutoff=0.0)[0]
        raise UnknownVerifierError(
            f"unknown verifier {name!r}: nearest is {nearest!r}; known: {', '.join(names(_PACKAGE))}, "
            "or 'module:function' for your own"
        )
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found or not attribute.isidentifier():
        raise UnknownVerifierError(
            f"verifier {name!r}: module {module!r} is not importable or {attribute!r} is no name in it; "
            "it must read 'module:function' with the module on PYTHONPATH"
        )


@lru_cache(maxsize=64)
def make_verifier(name: str) -> Verifier:
    """The verifier called ``name``, its libraries loaded. Raises ``UnknownVerifierError``."""
    check_verifier(name)
    if name in names(_PACKAGE):
        return cast("Verifier", load(_PACKAGE, name).Verifier())
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute, None)
    if not callable(function):
        raise UnknownVerifierError(f"verifier {name!r}: module {module!r} has no function {attribute!r}")
    return _function.Verifier(function)


@cache
def inline(name: str) -> bool:
    """Whether the verifier may judge in the caller's own process: linear in the text, no foreign code."""
    return name in names(_PACKAGE) and getattr(load(_PACKAGE, name), "INLINE", False)


def library_of(name: str) -> str:
    """The module that a verifier spends its start-up time importing."""
    built_in = name in names(_PACKAGE)
    return str(getattr(load(_PACKAGE, name), "LIBRARY", "")) if built_in else name.partition(":")[0]
