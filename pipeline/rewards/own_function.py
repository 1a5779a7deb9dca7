"""A user's own function, ``module:attribute``, found and checked before anybody calls it.

Its module is looked for in a folder that the configuration names, then in the working directory, then where Python
finds every module.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, cast

from pipeline.data import DataError


class UnknownFunctionError(DataError):
    """There is no such function, or it cannot be called as it must be; the message says what to change."""


def own_function(
    name: str, folder: str, who: str, arguments: Sequence[str], named: Mapping[str, Any] = MappingProxyType({})
) -> Callable[..., Any]:
    """The function ``name`` (``module:attribute``), its module imported.

    Args:
        folder: where its module is looked for first (``data.verifier_folder``); "" for none.
        who: what the function is to the run, for messages, e.g. "verifier 'reward:score'".
        arguments: what it is called with.
        named: what it is called with by name.

    Raises:
        UnknownFunctionError: there is none.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise UnknownFunctionError(f"{who}: write module:function, e.g. my_module:run")
    try:
        imported = _own_module(module, list(dict.fromkeys(filter(None, (folder, str(Path.cwd()))))))
    except ModuleNotFoundError as error:
        imports = "" if error.name and f"{module}.".startswith(f"{error.name}.") else f", which {module!r} imports"
        tried = f"{folder} (data.verifier_folder), " if folder else ""
        raise UnknownFunctionError(
            f"{who}: module {error.name!r} is not found{imports}; tried {tried}{Path.cwd()} (the working "
            "directory) and PYTHONPATH: put it there, or name another as module:function"
        ) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UnknownFunctionError(
            f"{who}: module {module!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(imported, attribute, None)
    if function is None:
        raise UnknownFunctionError(
            f"{who}: module {module!r} ({_place(imported)}) has no function {attribute!r}"
            + _nearest(attribute, imported)
        )
    if not callable(function):
        raise UnknownFunctionError(f"{who}: {attribute!r} is no function but {type(function).__name__}")
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise UnknownFunctionError(
            f"{who}: it takes {inspect.signature(function)}, and is called with "
            f"({', '.join([*arguments, *named])}): {error}"
        ) from error
    except ValueError:  # a function of C that does not tell its arguments
        pass
    return cast("Callable[..., Any]", function)


def returned(name: str, function: Callable[..., Any], given: object, wanted: str) -> str:
    """What to say of ``function``, called ``name``, that did not return what is ``wanted``: what, and where it is."""
    code = getattr(inspect.unwrap(function), "__code__", None) or getattr(type(function).__call__, "__code__", None)
    place = f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
    shown = " ".join(reprlib.repr(given).split())
    return f"{name}{place} returned {shown} ({type(given).__name__}): return {wanted}"


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
    return f": did you mean {near[0]!r}?" if near else ": write it there, or name another as module:function"
