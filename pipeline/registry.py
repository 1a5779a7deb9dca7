"""Methods by name: the modules of a package are its methods, one file each, listed without importing them.

A module whose name starts with ``_`` is a helper of its package and no method. The check of a configuration takes its
choices from ``names`` and so needs no torch; what runs a method imports it with ``load``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from functools import cache
from types import ModuleType


@cache
def names(package: str) -> tuple[str, ...]:
    """The methods of a package, in alphabetical order: its modules' names. Imports the package's parents alone.

    Raises ``ValueError`` when ``package`` is none.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package!r} is no package: name a package whose modules are methods")
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


@cache
def load(package: str, name: str) -> ModuleType:
    """The module of one method, imported. Raises ``ValueError`` with the names there are when there is no such
    method.
    """
    known = names(package)
    if name not in known:
        raise ValueError(f"{package.rpartition('.')[2]}: no {name!r}: use one of {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")
