"""Reads the tool calls in an answer, by transformers' response parsing.

One rule, the same with every engine. A model folder's own ``response_schema`` says how its answers are read. Where it
has none, the format is the first of those below that reads a call as the model's chat template writes one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.data import DataError
from pipeline.rollout.recording.template import PROBE, PROBE_ARGUMENTS, PROBES, ConversationTemplate

_OBJECT = {"type": "object"}


def _call(arguments: Mapping[str, Any], key: str = "arguments", required: Sequence[str] = ()) -> dict[str, Any]:
    """The schema of one call."""
    return {"type": "object", "properties": {"name": {"type": "string"}, key: arguments}, "required": list(required)}


_NAMED = _call(_OBJECT, required=["name", "arguments"])


def _schema(content: str, calls: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of transformers' chat parsing; ``content``: regular expression of the words beside the calls."""
    properties = {"content": {"type": "string", "x-regex": content}, "tool_calls": {"type": "array", **calls}}
    return {"type": "object", "properties": properties}


_BARE = r"\A\s*(?:<\|python_tag\|>)?\s*(\{.*\})\s*\Z"
_ARGS = r"\[TOOL_CALLS\](?P<name>[^\[\s]+)\[ARGS\](?P<arguments>\{.*?\})(?=\[TOOL_CALLS\]|\s*\Z)"
_FUNCTION = r"<function=(?P<name>[^>\s]+)>(?P<arguments>.*?)</function>"
_PARAMETER = r"<parameter=(?P<key>[^>\s]+)>\n?(?P<value>.*?)\n?</parameter>"
_FORMATS: dict[str, dict[str, Any]] = {
    'Hermes, Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>': _schema(
        r"\A(.*?)(?:<tool_call>|\Z)",
        {"x-regex-iterator": r"<tool_call>\s*(.*?)\s*</tool_call>", "items": {**_NAMED, "x-parser": "json"}},
    ),
    "Qwen-Coder: <function=name><parameter=x>...</parameter></function>": _schema(
        r"\A(.*?)(?:<tool_call>|<function=|\Z)",
        {"x-regex-iterator": _FUNCTION, "items": _call({**_OBJECT, "x-regex-key-value": _PARAMETER})},
    ),
    'Mistral: [TOOL_CALLS] [{"name": ..., "arguments": {...}}]': _schema(
        r"\A(.*?)(?:\[TOOL_CALLS\]|\Z)",
        {"x-regex": r"\[TOOL_CALLS\]\s*(\[.*\])", "x-parser": "json", "items": _NAMED},
    ),
    "Mistral since v11: [TOOL_CALLS]name[ARGS]{...}": _schema(
        r"\A(.*?)(?:\[TOOL_CALLS\]|\Z)",
        {"x-regex-iterator": _ARGS, "items": _call({**_OBJECT, "x-parser": "json"})},
    ),
    'Llama 3: {"name": ..., "parameters": {...}} and nothing else': _schema(
        r"\A(?!\s*(?:<\|python_tag\|>)?\s*\{)(.*)\Z",
        {
            "x-regex-iterator": _BARE,
            "items": {**_call(_OBJECT, "parameters", ["name", "parameters"]), "x-parser": "json"},
        },
    ),
}


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote."""

    name: str
    arguments: Mapping[str, Any]


class ToolCallReader:
    """Reads the answers of the model that ``template`` belongs to.

    Raises ``DataError`` where the model cannot be given tools: its template shows none, or nobody knows how it writes
    calls.
    """

    def __init__(self, template: ConversationTemplate) -> None:
        self._tokenizer, folder = template.tokenizer, template.tokenizer.folder
        if not template.renders_tools:
            raise DataError(
                f"the chat template of {folder} shows the model no tools: use a model with a template that does, or "
                "name one with data.chat_template_file"
            )
        self._schema: Mapping[str, Any] | None = None
        if not self._tokenizer.has_response_schema:
            self._schema = self._known(template)

    def _known(self, template: ConversationTemplate) -> Mapping[str, Any]:
        """The format that reads a call as the template writes it."""
        wanted = [ToolCall(PROBE, PROBE_ARGUMENTS)]
        for answer in template.probe_call():
            for schema in _FORMATS.values():
                if self._read(answer, schema, PROBES)[1] == wanted:
                    return schema
        raise DataError(
            f"nobody knows how the model of {self._tokenizer.folder} writes tool calls: its chat template writes them "
            f"in none of these forms: {'; '.join(_FORMATS)}. Put a response_schema into tokenizer_config.json "
            "(transformers' chat response parsing)"
        )

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        """The words of an answer, and its calls. An answer whose calls cannot be read is words alone."""
        return self._read(text, self._schema, tools)

    def _read(
        self, text: str, schema: Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[ToolCall]]:
        try:
            found = self._tokenizer.parse_answer(text, schema)
            calls = [_as_call(call.get("function", call), tools) for call in found.get("tool_calls") or ()]
        except (ValueError, TypeError, KeyError, AttributeError):
            return text, []
        return (str(found.get("content") or "").strip(), calls) if calls else (text, [])


# The reader of a template's answers; it is found once.
reader_of = lru_cache(maxsize=8)(ToolCallReader)


def _as_call(call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> ToolCall:
    arguments = call.get("arguments", call.get("parameters")) or {}
    if not isinstance(arguments, Mapping):
        raise TypeError(f"arguments of {call['name']} are no object")
    types = _types(call["name"], tools)
    return ToolCall(call["name"], {name: _value(value, types.get(name)) for name, value in arguments.items()})


def _types(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON types of a tool's parameters, where it names them."""
    for tool in tools:
        function = tool.get("function", {})
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {each: what.get("type") for each, what in properties.items() if isinstance(what, Mapping)}
    return {}


def _value(value: Any, kind: Any) -> Any:
    """A parameter that was written as bare text, as the tool's schema has it: JSON, unless it is to be a string."""
    if not isinstance(value, str) or kind in (None, "string"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
