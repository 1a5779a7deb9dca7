"""OpenAI's wire format: answers, pieces of streamed answers and errors as JSON objects, and what requests may hold.

Source: OpenAI's API reference, chat completions and completions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.rollout.recording.messages import RequestError
from pipeline.rollout.recording.recording import Completion

# What a request may hold beside what it is about. Other parameters are not used, and the client is told so.
_READ = frozenset({"model", "messages", "prompt", "tools", "tool_choice", "n", "stream", "stream_options", "logprobs"})
_READ |= {"stop"}
_SILENT = frozenset({"user", "metadata", "store"})
_CHOICES = ("auto", "none")
_STOPS = 4  # of a request, at most, as of OpenAI; SGLang takes 32 with the run's


@dataclass(frozen=True)
class Answer:
    """An answer on its way to a client."""

    completion: Completion
    chat: bool  # of chat completions, else of completions
    number: int  # of the request
    created: int  # Unix seconds
    model: str
    texts: list[str] | None  # of each drawn token, where log-probs were asked for

    def body(self) -> dict[str, Any]:
        """The answer as a whole."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.completion.finish_reason}
        if self.chat:
            choice |= {"message": self._message(), "logprobs": self._log_probs()}
        else:
            choice |= {"text": self.completion.text, "logprobs": self._log_probs()}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def pieces(self, *, with_usage: bool) -> Iterator[dict[str, Any]]:
        """The answer as a stream: of a chat the role, the words, each tool call; then why it ended, then the usage."""
        head = self._head("chat.completion.chunk") | ({"usage": None} if with_usage else {})

        def piece(content: Mapping[str, Any], reason: str | None = None, log_probs: Any = None) -> dict[str, Any]:
            choice = {"index": 0, "finish_reason": reason, "logprobs": log_probs}
            return {**head, "choices": [{**choice, **({"delta": content} if self.chat else content)}]}

        if self.chat:
            yield piece({"role": "assistant", "content": ""})
            if self.completion.text:
                yield piece({"content": self.completion.text}, log_probs=self._log_probs())
            for index, call in enumerate(self._message().get("tool_calls", ())):
                yield piece({"tool_calls": [{"index": index, **call}]})
            yield piece({}, self.completion.finish_reason)
        else:
            yield piece({"text": self.completion.text}, log_probs=self._log_probs())
            yield piece({"text": ""}, self.completion.finish_reason)
        if with_usage:
            yield {**head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of the request."""
        read, drawn = self.completion.prompt_tokens, len(self.completion.drawn.token_ids)
        return {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
            "prompt_tokens_details": {"cached_tokens": self.completion.drawn.cached_tokens},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        name, kind = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{name}-{self.number}", "object": kind, "created": self.created, "model": self.model}

    def _message(self) -> dict[str, Any]:
        calls = [
            {
                "id": name,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for name, call in zip(self.completion.call_ids, self.completion.tool_calls, strict=True)
        ]
        words = self.completion.text or (None if calls else "")
        return {"role": "assistant", "content": words} | ({"tool_calls": calls} if calls else {})

    def _log_probs(self) -> dict[str, Any] | None:
        """Of every drawn token, its end included, at the temperature of the draw."""
        if self.texts is None:
            return None
        texts, values = self.texts, self.completion.drawn.log_probs.tolist()
        if not self.chat:
            return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": _offsets(texts)}
        content = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in zip(texts, values, strict=True)
        ]
        return {"content": content, "refusal": None}


def unused(body: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request that are not used: sampling and limits are the run's."""
    plain = (name for name in body if name.isascii() and name.isidentifier())  # others do not belong into a log
    return {name: body[name] for name in plain if body[name] is not None and name not in _READ | _SILENT}


def check_request(body: Any) -> None:
    """Raise ``RequestError`` where a request asks for what would change what the model is trained on."""
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be a JSON object, not {type(body).__name__}")
    if body.get("n") not in (None, 1):
        raise RequestError(f"n={body['n']} answers at once: an episode has one; ask again, or open more episodes")
    if body.get("tool_choice") not in (None, *_CHOICES):
        raise RequestError(
            f"tool_choice={body['tool_choice']!r} must be auto or none: a forced call is not drawn from the policy"
        )
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise RequestError("response_format must be text: a forced form is not drawn from the policy")
    if not isinstance(body.get("stream_options") or {}, Mapping):
        raise RequestError('stream_options must be an object, e.g. {"include_usage": true}')
    for name, other in (("functions", "tools"), ("function_call", "tool_choice")):
        if body.get(name):
            raise RequestError(f"{name} is out of date: use {other}")


def read_prompt(prompt: Any) -> str | list[int]:
    """The one prompt of a completions request. Raises ``RequestError``."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        raise RequestError("prompt must be one text, or one list of token ids")
    return prompt


def read_stop(stop: Any) -> tuple[str, ...]:
    """The stop texts of a request: one text or several. Raises ``RequestError``."""
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or len(texts) > _STOPS or not all(map(_is_stop, texts)):
        raise RequestError(f"stop must be a text, or a list of at most {_STOPS} texts, none of them empty")
    return tuple(texts)


def _is_stop(text: Any) -> bool:
    """A lone surrogate, which JSON can spell, is no text: nothing can be sent on."""
    return isinstance(text, str) and bool(text) and text.encode("utf-8", "ignore").decode() == text


def error(message: str, code: str, status: int) -> dict[str, Any]:
    """An error of HTTP status ``status``."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _offsets(texts: list[str]) -> list[int]:
    found, at = [], 0
    for text in texts:
        found.append(at)
        at += len(text)
    return found
