"""Turns YAML files and ``key=value`` overrides into one checked ``RunConfig``.

A file may name others under ``defaults:``; they are read first, in order, so later ones and the file itself win. Every
file and every override becomes a list of dotted assignments, checked one by one against the schema, so an unknown key
or a wrong type is reported with the place that gave it.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.nodes import MappingNode, Node

from pipeline.config.errors import ConfigError, Problem
from pipeline.config.keys import Key, free_form_key, nearest_keys, one_slip, schema_keys
from pipeline.config.schema import RunConfig
from pipeline.config.synonyms import what_to_write
from pipeline.config.validate import problems_of
from pipeline.config.yaml12 import Dumper, UnreadableError, compose, entry_of, value_of

PACKAGED = Path(__file__).resolve().parents[2] / "configs"  # the same in a checkout and in an installed wheel
Schema = TypeVar("Schema")
COMMAND_LINE = "command line"  # source of an override
_FROM_OUTSIDE = re.compile(r"(?<!\\)\$\{\s*[\w.]+\s*:")  # an OmegaConf resolver, e.g. ${oc.env:HOME}
UNHASHED = ("name", "run_dir")  # labels: they do not change what a run computes


@dataclass(frozen=True)
class Assignment:
    """One value for one dotted key, and who gave it."""

    key: str
    value: Any
    source: str


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    check: bool = True,
    model_elsewhere: Callable[[str], Path] | None = None,
) -> RunConfig:
    """Compose, type and check a configuration.

    ``path`` is a YAML file (looked up as ``resolve_path`` does); None starts from the schema's defaults. ``overrides``
    are ``dotted.key=value`` with YAML values. ``check=False`` skips the rules of ``validate`` but never keys and types.
    ``model_elsewhere``: for a run that starts on another machine, whose files are not looked for here: from
    ``model.hf_path`` to a folder here with a copy of its config.json. Raises ``ConfigError`` with every problem found.
    """

    def rules(config: RunConfig) -> list[Problem]:
        if not check:
            return []
        folder = (model_elsewhere or resolve_path)(config.model.hf_path)
        return problems_of(config, folder, None if model_elsewhere else resolve_path)

    return load(RunConfig, path, overrides, rules, here=model_elsewhere is None)


def load(
    schema: type[Schema],
    path: Path | None,
    overrides: Sequence[str],
    rules: Callable[[Schema], Sequence[Problem]],
    *,
    here: bool = True,
) -> Schema:
    """``load_config`` for any dataclass of ``key.key`` fields and its own ``rules``.

    ``here``: whether the files that it names are on this machine, so that their paths are made absolute.
    """
    assignments = [] if path is None else _read_file(resolve_path(path), (), schema)
    for text in overrides:
        assignments += _parse_override(text, schema)
    if here:
        assignments = [_found(given, schema) for given in assignments]
    if here and path is not None and schema is RunConfig:
        assignments += _verifier_folder(assignments, resolve_path(path).resolve())
    config: Schema = _build(assignments, schema, "" if path is None else str(resolve_path(path).resolve()))
    problems = rules(config)
    if problems:
        raise ConfigError.of([replace(problem, source=_source(problem.key, assignments)) for problem in problems])
    return config


def _found(given: Assignment, schema: type) -> Assignment:
    """A path that can be read from any folder: absolute, or below the packaged ``configs/`` where that has it.

    A relative path belongs to the folder of the file that names it; on the command line, and in a packaged file, to the
    working directory. What is read, and that folder does not have, may be packaged.
    """
    known = schema_keys(schema).get(given.key)
    if known is None or not known.path or not isinstance(given.value, str) or not given.value or "${" in given.value:
        return given
    own = given.source != COMMAND_LINE and not Path(given.source).is_relative_to(PACKAGED)
    folder = Path(given.source).parent if own else Path.cwd()
    if known.path == "written":
        return replace(given, value=str(folder / os.path.expanduser(given.value)))
    path = resolve_path(given.value, folder)
    return replace(given, value=str(path.relative_to(PACKAGED) if path.is_relative_to(PACKAGED) else path))


def _verifier_folder(assignments: Sequence[Assignment], path: Path) -> Iterator[Assignment]:
    """``data.verifier_folder`` where none is given and a verifier or an environment may be the user's own: it is then
    written down, so that workers, resumed runs and jobs look in the same place.
    """
    last = {given.key: given for given in assignments}
    given = {name: last[name].value for name in last if name.startswith("data.")}
    environment = str(given.get("data.environment.id", ""))
    own = ":" in environment or bool(environment and given.get("data.environment.name") == "verifiers")
    key = "data.environment.id" if own else "data.verifier"
    named = str(given.get(key, "auto"))
    own = own or ":" in named
    may_be_own = own or (named == "auto" and given.get("data.source.kind") == "jsonl")
    if may_be_own and not given.get("data.verifier_folder"):
        by = last[key].source if own else COMMAND_LINE
        file = path if by == COMMAND_LINE else Path(by)
        if own or not file.is_relative_to(PACKAGED):
            yield Assignment("data.verifier_folder", str(file.parent), str(file))


def resolve_path(value: str | Path, folder: Path = Path()) -> Path:
    """A relative path from ``folder`` if it exists there, else from the packaged ``configs/`` if it exists there.

    Otherwise the path from ``folder``, which does not exist: the caller says so. ``folder``: by default the working
    directory.
    """
    path = Path(os.path.expanduser(value))  # Path's own raises where there is no such user
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    own = path.is_absolute() or os.path.exists(folder / path) or not os.path.exists(PACKAGED / inside)
    return folder / path if own else PACKAGED / inside


def override(key: str, text: str | Path) -> str:
    """``key=text`` as an override that means exactly ``text``, whatever signs of YAML or references it holds."""
    quoted = yaml.dump(str(text), Dumper=Dumper, default_style='"', width=math.inf, allow_unicode=True)
    return f"{key}={quoted.rstrip()}"


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration; ``load_config`` reads it back to an equal one."""
    return yaml.dump(asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: RunConfig) -> str:
    """SHA-256 over the canonical YAML (sorted keys) of everything but ``name`` and ``run_dir``; 64 hex digits."""
    values = {name: value for name, value in asdict(config).items() if name not in UNHASHED}
    return hashlib.sha256(yaml.safe_dump(values, sort_keys=True).encode()).hexdigest()


def document(config: RunConfig) -> str:
    """The configuration as YAML with the meaning of each key as a comment; it loads back to an equal one."""
    keys = schema_keys()
    return "\n".join(_document_section(config, "", keys)) + "\n"


def _document_section(section: Any, prefix: str, keys: Mapping[str, Key]) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in vars(section).items():
        key = keys[prefix + name]
        comment = key.help + (f" [{key.words or key.limits}]" if key.words or key.limits else "")
        if is_dataclass(value):
            yield f"{indent}{name}:  # {comment}"
            yield from _document_section(value, f"{prefix}{name}.", keys)
        else:
            text = yaml.dump(
                {name: value}, Dumper=Dumper, default_flow_style=True, width=10**6, allow_unicode=True
            ).strip()[1:-1]
            yield f"{indent}{text}  # {comment}"


def _read_file(path: Path, parents: tuple[Path, ...], schema: type) -> list[Assignment]:
    """The assignments of a file after those of its ``defaults``."""
    path = path.resolve()
    if path in parents:
        chain = " -> ".join(str(p) for p in (*parents, path))
        raise ConfigError("defaults", str(path), f"files include each other in a circle: {chain}", "remove one of them")
    content = _parse_file(path)
    defaults: Any = next((value_of(node) for key, node in content.value if key.value == "defaults"), [])
    content.value = [(key, node) for key, node in content.value if key.value != "defaults"]
    if not isinstance(defaults, list) or not all(isinstance(entry, str) for entry in defaults):
        raise ConfigError("defaults", defaults, "not a list of file names", "write defaults: [base.yaml]", str(path))
    assignments: list[Assignment] = []
    for entry in defaults:
        assignments += _read_file(_find_default(entry, path), (*parents, path), schema)
    return assignments + list(_flatten("", content, str(path), schema))


def _parse_file(path: Path) -> MappingNode:
    if not path.is_file():
        raise ConfigError(
            "config file", str(path), "no such file", f"give an existing YAML file; examples are in {PACKAGED}"
        )
    try:
        content = compose(path.read_text("utf-8"))
    except UnreadableError as error:
        raise ConfigError("config file", str(path), f"not readable as YAML: {error.problem}", error.remedy) from error
    except (UnicodeDecodeError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError("config file", str(path), f"not readable: {said}", "give a text file") from error
    if content is None:
        return MappingNode("", [])
    if not isinstance(content, MappingNode):
        raise ConfigError("config file", str(path), "not a mapping of keys to values", "write key: value lines")
    return content


def _find_default(entry: str, including: Path) -> Path:
    found = resolve_path(entry, including.parent)
    if found.is_file():
        return found
    remedy = f"name a file relative to {including.parent} or to {PACKAGED}"
    raise ConfigError("defaults", entry, f"no such file: {including.parent / entry}", remedy, str(including))


def _flatten(key: str, node: Node | None, source: str, schema: type) -> Iterator[Assignment]:
    """Dotted assignments; a mapping is entered where the schema has a section or free-form entries."""
    known = schema_keys(schema).get(key)
    if isinstance(node, MappingNode) and (not key or (node.value and known and (known.is_section or known.free_form))):
        for name, child in node.value:
            yield from _flatten(f"{key}.{name.value}" if key else name.value, child, source, schema)
        return
    mapping = free_form_key(key, schema)
    value = (
        entry_of(node, get_args(mapping.type)[1]) if mapping and node else value_of(node, known.type if known else Any)
    )
    yield Assignment(key, value, source)


def _parse_override(text: str, schema: type) -> Iterator[Assignment]:
    """``dotted.key=value``; a mapping is several assignments, as in a file."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        is_file = text.endswith((".yaml", ".yml"))
        remedy = f"a file is named by --config {text}" if is_file else "write e.g. learner.optimizer.lr=3e-4"
        raise ConfigError(text, None, "an override is key=value", remedy, COMMAND_LINE)
    try:
        node = compose(value)
    except UnreadableError as error:
        remedy = f"{error.remedy}; a text is quoted twice: 'key=\"text\"'"
        raise ConfigError(name, value, f"not a YAML value: {error.problem}", remedy, COMMAND_LINE) from error
    yield from _flatten(name.strip(), node, COMMAND_LINE, schema)


def _build(assignments: Sequence[Assignment], schema: type, file: str) -> Any:
    """Apply the assignments in order to the schema's defaults; ``file``: where what is missing belongs, or ""."""
    tree: DictConfig = pickle.loads(_defaults(schema))
    problems = [problem for assignment in assignments if (problem := _apply(tree, assignment, schema)) is not None]
    if problems:
        raise ConfigError.of(problems)
    try:
        config = OmegaConf.to_object(tree)
    except (OmegaConfBaseException, RecursionError) as error:
        raise _incomplete(tree, assignments, schema, file) or _bad_reference(error, assignments) from error
    assert isinstance(config, schema)
    return config


@lru_cache
def _defaults(schema: type) -> bytes:
    """The schema's defaults, pickled. Making them takes 45 ms, unpickling them 1.4, and ``deepcopy`` would take 7."""
    return pickle.dumps(OmegaConf.structured(schema))


def _apply(tree: DictConfig, assignment: Assignment, schema: type) -> Problem | None:
    """Set one value; the problem, if it has one."""
    key, value, source = assignment.key, assignment.value, assignment.source
    mapping = free_form_key(key, schema)
    known = schema_keys(schema).get(key)
    if known is None and mapping is None:
        return _unknown(assignment, schema)
    if _FROM_OUTSIDE.search(str(value)):
        what = "takes its value from outside the configuration, and would copy it into the run's config.yaml"
        return Problem(
            key, value, what, "write the value; for a secret, name its variable in the cluster's secrets", source
        )
    wanted = f"give {known.type_name}" if known else "give a plain value"
    if known and known.is_section:
        wanted += f", e.g. {next(name for name in schema_keys(schema) if name.startswith(key + '.'))}"
    wrong_type = Problem(key, value, "wrong type", wanted, source)
    if known is not None and not _plausible(known, value):
        return wrong_type
    if known is not None:
        value = _number(known.type, value)
    try:
        OmegaConf.update(tree, key, value, merge=True, force_add=mapping is not None)
    except (OmegaConfBaseException, AssertionError, RecursionError):
        if "${" not in str(value):
            return wrong_type
        remedy = "refer to another key as ${other.key}, or write \\${ for the two characters themselves"
        return Problem(key, value, "holds ${, which begins a reference, and is none", remedy, source)
    return None


def _incomplete(tree: DictConfig, assignments: Sequence[Assignment], schema: type, file: str) -> ConfigError | None:
    """Every value that is required and not given, or a reference on the way to one that leads nowhere."""
    try:
        missing = sorted(OmegaConf.missing_keys(tree))
    except (OmegaConfBaseException, RecursionError) as error:
        return _bad_reference(error, assignments)
    keys = schema_keys(schema)
    problems = [Problem(key, None, "a value is required", f"set {key}: {keys[key].help}", file) for key in missing]
    return ConfigError.of(problems) if problems else None


def _bad_reference(error: Exception, assignments: Sequence[Assignment]) -> ConfigError:
    key = getattr(error, "full_key", None) or ""
    given = [a for a in reversed(assignments) if (a.key == key if key else "${" in str(a.value))]
    key, value, source = (given[0].key, given[0].value, given[0].source) if given else (key, None, "")
    return ConfigError(key, value, "a reference that leads nowhere", "name another key, as ${section.key}", source)


def _plausible(key: Key, value: Any) -> bool:
    """Whether a value fits its key's type, more strictly than OmegaConf sees it.

    OmegaConf reads ``off`` for a text as "False", 2 as true, and fills sections from scalars.
    """
    return isinstance(value, dict) if key.is_section else _fits(key.type, value)


def _fits(expected: Any, value: Any) -> bool:
    """Whether a YAML value can stand for a type; ``${...}`` references are left to OmegaConf."""
    if isinstance(value, str) and "${" in value:
        return True
    if get_origin(expected) is list:
        return isinstance(value, list) and all(_fits(get_args(expected)[0], entry) for entry in value)
    if get_origin(expected) is dict:
        return isinstance(value, dict)
    if expected is bool:
        return isinstance(value, bool)
    return isinstance(value, str if expected is str else (int, float)) and not isinstance(value, bool)


def _number(expected: Any, value: Any) -> Any:
    """The value with 1e3 and 2.0 as the integers that they are, where integers are expected, and 10^400 as infinite."""
    if get_origin(expected) is list and isinstance(value, list):
        return [_number(get_args(expected)[0], entry) for entry in value]
    if expected is float and isinstance(value, int) and abs(value) >= 2**1023:
        return math.copysign(math.inf, value)
    return int(value) if expected is int and isinstance(value, float) and value.is_integer() else value


def _unknown(assignment: Assignment, schema: type) -> Problem:
    nearest = nearest_keys(assignment.key, schema)
    remedy = f"did you mean {' or '.join(nearest)}?" if nearest else "see `isentrope config show` for every key"
    if schema is RunConfig and (meant := what_to_write(assignment.key)):
        remedy = f"{remedy} Else {meant}" if one_slip(assignment.key, nearest) else meant
    return Problem(assignment.key, assignment.value, "unknown key", remedy, assignment.source)


def _source(key: str, assignments: Sequence[Assignment]) -> str:
    """Who last gave ``key``, or an entry of it where it is free-form."""
    given = (a.source for a in reversed(assignments) if a.key == key or a.key.startswith(f"{key}."))
    return next(given, "default")
