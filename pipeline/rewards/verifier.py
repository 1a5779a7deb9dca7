"""A verifier by its name: a file of ``verifiers``, or a user's own function.

A name of the form ``module:attribute`` is a user's own function ``(prompt, text) -> float``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
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
    """Raise ``UnknownVerifierError`` unless ``name`` is a file, or a function ``module:attribute`` of (prompt,
    text).
    """
    if name in names(_PACKAGE):
        return
    module, colon, attribute = name.partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, names(_PACKAGE), n=1, cutoff=0.0)[0]
        raise UnknownVerifierError(
            f"unknown verifier {name!r}: nearest is {nearest!r}; known: {', '.join(names(_PACKAGE))}, "
            "or 'module:function' for your own"
        )
    _own_function(name, module, attribute)


def _own_function(name: str, module: str, attribute: str) -> Callable[[Prompt, str], float]:
    """A user's function, its module imported. Raises ``UnknownVerifierError`` with what is wrong with it."""
    folder = str(Path.cwd())
    if folder not in sys.path:  # the command, unlike `python -m`, does not look for modules where it is called
        sys.path.append(folder)
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        missing = f"module {error.name!r} is not found" + (
            "" if error.name == module else f", which {module!r} imports"
        )
        raise UnknownVerifierError(
            f"verifier {name!r}: {missing}; it must read 'module:function' with the module in the working directory "
            f"({folder}) or on PYTHONPATH"
        ) from error
    except Exception as error:  # a user's module may raise anything
        raise UnknownVerifierError(
            f"verifier {name!r}: module {module!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if function is None:
        raise UnknownVerifierError(f"verifier {name!r}: module {module!r} has no function {attribute!r}")
    if not callable(function):
        raise UnknownVerifierError(f"verifier {name!r}: {attribute!r} is no function but {type(function).__name__}")
    try:
        inspect.signature(function).bind(None, "")
    except TypeError as error:
        raise UnknownVerifierError(
            f"verifier {name!r}: it takes {inspect.signature(function)}, and is called with (prompt, text): {error}"
        ) from error
    except ValueError:  # a function of C that does not tell its arguments
        pass
    return cast("Callable[[Prompt, str], float]", function)


@lru_cache(maxsize=64)
def make_verifier(name: str) -> Verifier:
    """The verifier called ``name``, its libraries loaded. Raises ``UnknownVerifierError``."""
    check_verifier(name)
    if name in names(_PACKAGE):
        return cast("Verifier", load(_PACKAGE, name).Verifier())
    module, _, attribute = name.partition(":")
    return _function.Verifier(_own_function(name, module, attribute))


@cache
def inline(name: str) -> bool:
    """Whether the verifier may judge in the caller's own process: linear in the text, no foreign code."""
    return name in names(_PACKAGE) and getattr(load(_PACKAGE, name), "INLINE", False)


def library_of(name: str) -> str:
    """The module that a verifier spends its start-up time importing."""
    built_in = name in names(_PACKAGE)
    return str(getattr(load(_PACKAGE, name), "LIBRARY", "")) if built_in else name.partition(":")[0]
