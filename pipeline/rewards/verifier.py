"""A verifier by its name: a file of ``verifiers``, or a user's own function.

A name of the form ``module:attribute`` is a user's own function ``(prompt, text) -> float``. Its module is looked for
in ``data.verifier_folder``, then in the working directory, then where Python finds every module.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Protocol, cast

from pipeline.data import DataError
from pipeline.registry import load, names
from pipeline.rewards.own_function import UnknownFunctionError, own_function
from pipeline.rewards.verifiers import _function
from pipeline.types import Prompt

_PACKAGE = "pipeline.rewards.verifiers"


class UnknownVerifierError(DataError):
    """No verifier has this name; the message gives the nearest one."""


class Verifier(Protocol):
    """Judges one response. May raise or hang: ``VerifierStage`` then marks the sample."""

    def score(self, prompt: Prompt, text: str) -> float:
        """Reward in [0, 1]; exactly 1 means correct."""

    @staticmethod
    def extract(text: str) -> str | None:
        """What the response answers, as it is written there; None where it answers nothing. Linear in the text."""

    def refusal(self, prompt: Prompt) -> str:
        """Why no response could match the prompt's reference answer, with the remedy; "" where one can."""


def check_verifier(name: str, folder: str = "") -> None:
    """Raise ``UnknownVerifierError`` unless ``name`` is a file, or a function ``module:attribute`` of (prompt, text).

    ``folder`` (``data.verifier_folder``; "" for none): where its module is looked for first.
    """
    if name in names(_PACKAGE):
        return
    if ":" not in name:
        nearest = difflib.get_close_matches(name, names(_PACKAGE), n=1, cutoff=0.0)[0]
        raise UnknownVerifierError(
            f"unknown verifier {name!r}: nearest is {nearest!r}; known: {', '.join(names(_PACKAGE))}, "
            "or 'module:function' for your own"
        )
    _own(name, folder)


def _own(name: str, folder: str) -> Callable[[Prompt, str], float]:
    """A user's function. Raises ``UnknownVerifierError`` with what is wrong with it."""
    try:
        return own_function(name, folder, f"verifier {name!r}", ("prompt", "text"))
    except UnknownFunctionError as error:
        raise UnknownVerifierError(str(error)) from error


@lru_cache(maxsize=64)
def make_verifier(name: str, folder: str = "") -> Verifier:
    """The verifier called ``name``, its libraries loaded. ``folder``: see ``check_verifier``.

    Raises ``UnknownVerifierError``.
    """
    check_verifier(name, folder)
    if name in names(_PACKAGE):
        return cast("Verifier", load(_PACKAGE, name).Verifier())
    return _function.Verifier(name, _own(name, folder))


def extracted(name: str, text: str) -> str | None:
    """``Verifier.extract`` of the verifier called ``name``, without loading its libraries."""
    verifier = load(_PACKAGE, name).Verifier if name in names(_PACKAGE) else _function.Verifier
    return cast("str | None", verifier.extract(text))


@cache
def inline(name: str) -> bool:
    """Whether the verifier may judge in the caller's own process: linear in the text, no foreign code."""
    return name in names(_PACKAGE) and getattr(load(_PACKAGE, name), "INLINE", False)


def library_of(name: str) -> str:
    """The module that a verifier spends its start-up time importing."""
    built_in = name in names(_PACKAGE)
    return str(getattr(load(_PACKAGE, name), "LIBRARY", "")) if built_in else name.partition(":")[0]
