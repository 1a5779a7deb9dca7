"""Reads the messages of OpenAI's chat format into the one form that is compared, rendered and recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.tokenizer import Message

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")


class RequestError(ValueError):
    """A client asked for what cannot be done; the message says what, and what to ask instead.

    ``code`` and ``status`` (of HTTP) are those of OpenAI's errors.
    """

    def __init__(self, message: str, code: str = "invalid_request", status: int = 400) -> None:
        super().__init__(message)
        self.code, self.status = code, status


def read_messages(messages: Any) -> tuple[Message, ...]:
    """The messages with text as content and the arguments of tool calls as objects, as chat templates read them.

    Raises ``RequestError`` naming the first message that cannot be read.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list with at least one message")
    return tuple(_message(message, f"messages[{number}]") for number, message in enumerate(messages))


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools of a request, each a function with a name and an object of parameters.

    Raises ``RequestError`` naming the first that is none: a chat template would write something all the same.
    """
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError("tools must be a list of objects")
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise RequestError(f'{where} must be {{"type": "function", "function": {{...}}}}')
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"{where}.function must be an object with a name")
        schema = function.get("parameters", {"type": "object"})
        properties = schema.get("properties", {}) if isinstance(schema, Mapping) else None
        if not isinstance(properties, Mapping) or schema.get("type", "object") != "object":
            raise RequestError(
                f"{where}.function.parameters of {function['name']} must be a JSON schema of type object"
            )
    return tuple(tools)


def identity(message: Message) -> tuple[str, ...]:
    """What makes two messages the same.

    Of an assistant's the words, blanks around them aside, and the calls. Not the ids of calls: clients drop them.
    """
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    content = message["content"].strip() if message["role"] == "assistant" else message["content"]
    return message["role"], content, json.dumps(calls, sort_keys=True) if calls else ""


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise RequestError(f"{where}.role={message.get('role')!r} must be one of {', '.join(_ROLES)}")
    read: dict[str, Any] = {"role": role, "content": _text(message.get("content"), where)}
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, Sequence):
            raise RequestError(f"{where}.tool_calls must be a list, in a message of the assistant")
        read["tool_calls"] = [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
    for name in ("tool_call_id", "name", "reasoning_content"):
        if isinstance(message.get(name), str):
            read[name] = message[name]
    return read


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}.content must be a text or a list of parts, not {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.content has a part of type {kind!r}: the model reads text only")
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must be a call of a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise RequestError(f"{where}.function.arguments is not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where}.function.arguments must be a JSON object, not {type(arguments).__name__}")
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": dict(arguments)},
    }
