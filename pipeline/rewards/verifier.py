"""A verifier by its name: a file of ``verifiers``, or a user's own function.

A name of the form ``module:attribute`` is a user's own function ``(prompt, text) -> float``. Its module is looked for
in ``data.verifier_folder``, then in the working directory, then where Python finds every module.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
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
    module, colon, attribute = name.partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, names(_PACKAGE), n=1, cutoff=0.0)[0]
        raise UnknownVerifierError(
            f"unknown verifier {name!r}: nearest is {nearest!r}; known: {', '.join(names(_PACKAGE))}, "
            "or 'module:function' for your own"
        )
    _own_function(name, module, attribute, folder)


def _own_function(name: str, module: str, attribute: str, folder: str) -> Callable[[Prompt, str], float]:
    """A user's function, its module imported. Raises ``UnknownVerifierError`` with what is wrong with it."""
    try:
        imported = _own_module(module, list(dict.fromkeys(filter(None, (folder, str(Path.cwd()))))))
    except ModuleNotFoundError as error:
        imports = "" if error.name and f"{module}.".startswith(f"{error.name}.") else f", which {module!r} imports"
        tried = f"{folder} (data.verifier_folder), " if folder else ""
        raise UnknownVerifierError(
            f"verifier {name!r}: module {error.name!r} is not found{imports}; tried {tried}{Path.cwd()} (the working "
            "directory) and PYTHONPATH: put it there, or name another as module:function"
        ) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UnknownVerifierError(
            f"verifier {name!r}: module {module!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(imported, attribute, None)
    if function is None:
        raise UnknownVerifierError(
            f"verifier {name!r}: module {module!r} ({_place(imported)}) has no function {attribute!r}"
            + _nearest(attribute, imported)
        )
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


def _own_module(module: str, folders: Sequence[str]) -> ModuleType:
    """A module, imported from the first of ``folders`` that has it, else from where Python finds it.

    The folders stay at the end of ``sys.path``: what the module imports later is found beside it, and nothing that is
    installed is hidden. Raises what the import raises; ``ImportError`` where another module of that name is loaded.
    """
    sys.path += [folder for folder in folders if folder not in sys.path]
    importlib.invalidate_caches()
    top = module.partition(".")[0]
    spec = PathFinder.find_spec(top, list(folders))
    if spec is None or spec.origin is None:
        return importlib.import_module(module)
    loaded = sys.modules.get(top)
    if loaded is not None and _place(loaded) != spec.origin:
        raise ImportError(f"{spec.origin} has the name of {_place(loaded)}, which is loaded: rename it")
    sys.path.insert(0, str(_folder_of(spec)))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(_folder_of(spec)))


def _folder_of(spec: ModuleSpec) -> Path:
    return Path(str(spec.origin)).parents[1 if spec.submodule_search_locations is not None else 0]


def _place(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or "a module of Python's own")


def _nearest(attribute: str, module: ModuleType) -> str:
    near = difflib.get_close_matches(attribute, [name for name, value in vars(module).items() if callable(value)], n=1)
    return f": did you mean {near[0]!r}?" if near else ""


@lru_cache(maxsize=64)
def make_verifier(name: str, folder: str = "") -> Verifier:
    """The verifier called ``name``, its libraries loaded. ``folder``: see ``check_verifier``.

    Raises ``UnknownVerifierError``.
    """
    check_verifier(name, folder)
    if name in names(_PACKAGE):
        return cast("Verifier", load(_PACKAGE, name).Verifier())
    module, _, attribute = name.partition(":")
    return _function.Verifier(_own_function(name, module, attribute, folder))


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
