"""Reads YAML by the rules of YAML 1.2: ``010`` is ten, ``12:00:00`` and ``on`` are texts.

A key whose type is text keeps what was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

DEPTH, NODES = 64, 100_000  # a configuration has some 5 levels and 200 nodes
_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str"))
_RULES = {  # plain scalars, by the core schema of YAML 1.2, section 10.3.2
    _NULL: r"null|Null|NULL|~|",
    _BOOL: r"true|True|TRUE|false|False|FALSE",
    _INT: r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    _FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_DIGITS = 4000  # more, and Python refuses to read an integer


class UnreadableError(ValueError):
    """A text that cannot be read. ``problem`` says why, with line and column; ``remedy`` what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


class _Loader(yaml.SafeLoader):
    """Composes nodes whose tags follow ``_RULES``."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  a class attribute of PyYAML's

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """As PyYAML's; stops before Python's own stack does."""
        self._depth += 1
        if self._depth > DEPTH:
            raise _too_deep()
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _tag, _rule in _RULES.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_rule})\Z"), None)


class Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else, and escapes what OmegaConf would take for a
    reference.
    """

    def represent_text(self, text: str) -> ScalarNode:
        r"""``${`` becomes ``\${``, and backslashes before it are doubled."""
        return self.represent_str(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text))


Dumper.add_representer(str, Dumper.represent_text)

for _tag, _rule in _RULES.items():
    Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_rule})\Z"), None)


def compose(text: str) -> Node | None:
    """The tree of nodes of ``text``; None where there is nothing in it. Raises ``UnreadableError``."""
    try:
        node: Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise UnreadableError(f"holds the character {chr(error.character)!r}", "remove it") from error
    except yaml.MarkedYAMLError as error:
        raise _unreadable(error, text) from error
    if node is not None:
        _check(node)
    return node


def value_of(node: Node | None, expected: Any = Any) -> Any:
    """The Python value of a checked node.

    ``expected``: the type that is wanted. Where that is text, a number stays as it was written; in a mapping of texts
    everything does, but for true and false in one that takes both.
    """
    if isinstance(node, SequenceNode):
        entry = get_args(expected)[0] if get_origin(expected) is list else Any
        return [value_of(child, entry) for child in node.value]
    if isinstance(node, MappingNode):
        entry = get_args(expected)[1] if get_origin(expected) is dict else Any
        return {key.value: entry_of(child, entry) for key, child in node.value}
    if node is None:
        return None
    return node.value if expected is str and node.tag in (_INT, _FLOAT) else _scalar(node)


def entry_of(node: Node, expected: Any) -> Any:
    """``value_of`` an entry of a mapping with entries of type ``expected``."""
    texts = expected is str or str in get_args(expected)
    flag = node.tag == _BOOL and bool in get_args(expected)
    return node.value if texts and not flag and isinstance(node, ScalarNode) else value_of(node, expected)


def _scalar(node: Node) -> Any:
    text: str = node.value
    if node.tag == _INT:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if node.tag == _FLOAT:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return {_NULL: None, _BOOL: text.lower() == "true"}.get(node.tag, text)


def _check(root: Node) -> None:
    """Raises ``UnreadableError`` for what is YAML, but no configuration. An alias counts as often as it is used."""
    stack = [(root, 1)]
    seen = 0
    while stack:
        node, depth = stack.pop()
        seen += 1
        if seen > NODES:
            raise UnreadableError(f"more than {NODES} entries", "write less, or fewer aliases (*name)")
        if depth > DEPTH:
            raise _too_deep()
        stack += [(child, depth + 1) for child in _children(node)]


def _children(node: Node) -> Iterator[Node]:
    where = _place(node.start_mark)
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise UnreadableError(f"{where}: a key that is no text", "write key: value")
            if not key.value:
                raise UnreadableError(f"{_place(key.start_mark)}: an empty key", "write key: value")
            if key.value in names:
                raise UnreadableError(f"{_place(key.start_mark)}: duplicate key {key.value!r}", "keep one of them")
            names.add(key.value)
            yield value
    elif node.tag not in (*_RULES, _STR):
        raise UnreadableError(f"{where}: the tag {node.tag}", "remove it")
    elif node.tag in _RULES and not re.fullmatch(_RULES[node.tag], node.value):
        raise UnreadableError(f"{where}: {node.value!r} is not what its tag says", "remove the tag")
    elif node.tag == _INT and len(node.value) > _DIGITS:
        raise UnreadableError(f"{where}: a number of {len(node.value)} digits", "write a shorter one")


def _too_deep() -> UnreadableError:
    return UnreadableError(f"more than {DEPTH} levels, one inside the other", "no key lies so deep: remove some")


def _unreadable(error: yaml.MarkedYAMLError, text: str) -> UnreadableError:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return UnreadableError(str(error.problem), "mend it")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or line[mark.column : mark.column + 1] == "\t":
        return UnreadableError(f"line {mark.line + 1} has a tab where YAML wants spaces", "indent with spaces")
    return UnreadableError(f"{_place(mark)}: {error.problem}", "mend it, or quote the text that is meant")


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
