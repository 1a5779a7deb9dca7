"""Records one episode: the exact token ids that the model read and drew, whatever a client says in between.

The rule of continuation. A request whose conversation begins with one that the model answered before, words and calls
unchanged, continues from the recorded ids of the longest such one. Every other request begins a branch from its own
messages. So a client that edits what was said makes a branch, and so does one that asks twice.

The rule of training. The branch that ends in the newest answer is the one that the reward speaks of: it is trained on.
Answers on other branches are dropped, and counted (``Sample.dropped_tokens``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.data.tokenizer import Message
from pipeline.rollout.recording.messages import RequestError, identity, read_messages, read_tools
from pipeline.rollout.recording.template import ConversationTemplate
from pipeline.rollout.recording.tool_calls import ToolCall, reader_of
from pipeline.seeds import turn_seed
from pipeline.types import Cuts, GenerateRequest, Prompt, Role, Sample, Turn, WeightSpan

# A request's size in bytes: what any may have, and more for each token of a conversation. Most tokens are of 4 bytes.
_REQUEST_BYTES, _BYTES_PER_TOKEN = 1 << 16, 64

# Draws the one sample of a request. Raises ``EngineError``.
Draw = Callable[[GenerateRequest], Awaitable[Sample]]


@dataclass(frozen=True)
class Limits:
    """What bounds one episode."""

    max_new_tokens: int  # of one answer
    max_tokens: int  # of a whole conversation: prompt, answers, tools and template
    max_turns: int  # answers, over all branches


@dataclass(frozen=True)
class Completion:
    """One answer, as a client is told."""

    text: str  # the words beside the tool calls, up to the client's own stop text
    tool_calls: tuple[ToolCall, ...]
    call_ids: tuple[str, ...]  # of ``tool_calls``
    finish_reason: str  # "stop" | "length" | "tool_calls"
    prompt_tokens: int  # tokens before the answer
    drawn: Sample  # its token ids and their log-probs at the temperature of the draw

    @property
    def message(self) -> Message:
        """The answer as a message, in OpenAI's form."""
        return _message(self.text, self.tool_calls, self.call_ids)


@dataclass(frozen=True)
class _Said:
    """An answer of the model, and what led to it."""

    before: _Said | None
    context: tuple[int, ...]  # token ids between ``before`` and this answer
    drawn: Sample
    kind: str  # conversations of one kind can be compared: with the same tools, or plain text, or token ids
    key: Sequence[Any]  # what a conversation that continues from here begins with
    messages: tuple[Message, ...]  # of a chat, the answer included
    length: int  # tokens, up to the answer's end

    @property
    def finish_reason(self) -> str:
        """Why the answer ended, as a client is told."""
        calls = bool(self.messages and self.messages[-1].get("tool_calls"))
        return "tool_calls" if calls and self.drawn.finish_reason == "stop" else self.drawn.finish_reason

    def path(self) -> list[_Said]:
        """The answers from the first to this one."""
        found, last = [self], self.before
        while last:
            found.append(last)
            last = last.before
        return found[::-1]


class Recording:
    """One episode under one seed.

    Args:
        prompt: what the episode is about; its conversations must begin with the token ids, of which there may be none.
        template: of the model.
        draw: asks an engine.
        seed: of the sample; each answer is drawn under ``pipeline.seeds.turn_seed`` of it.
        temperature, top_p, cuts: of every answer, see ``GenerateRequest``.
    """

    def __init__(
        self,
        prompt: Prompt,
        template: ConversationTemplate,
        draw: Draw,
        *,
        seed: int,
        temperature: float,
        limits: Limits,
        role: Role = Role.MAIN,
        top_p: float = 1.0,
        cuts: Cuts | None = None,
    ) -> None:
        self.prompt, self.seed, self.temperature, self.role, self.limits = prompt, seed, temperature, role, limits
        self._top_p, self._cuts = top_p, cuts
        self.ended = ""  # "turn_limit" or "token_limit" once that limit was met
        self._template, self._draw = template, draw
        self._said: list[_Said] = []  # in the order of the draws
        self._calls = 0
        self._one_at_a_time = asyncio.Lock()

    async def chat(
        self, messages: Any, tools: Any = None, *, calls: bool = True, stop: tuple[str, ...] = ()
    ) -> Completion:
        """The model's answer to ``messages``, in OpenAI's form; ``tools`` likewise.

        ``calls``: whether calls of tools are looked for in the answer; the model sees the tools either way. ``stop``:
        the draw ends at the first of these texts, of which the client is not told, as of OpenAI; it stays recorded.

        Raises ``RequestError`` where they cannot be read, rendered or answered, ``DataError`` where the model cannot be
        given tools, and what ``draw`` raises.
        """
        read, tools = read_messages(messages), read_tools(tools)
        reader = reader_of(self._template) if tools else None
        kind, key = f"chat {json.dumps(list(tools), sort_keys=True)}", tuple(map(identity, read))
        async with self._one_at_a_time:
            before = self._longest(kind, key)
            if before is None:
                context = self._template.opening(read, tools)
            else:
                last = int(before.drawn.token_ids[-1])
                context = self._template.following(read, len(before.messages) - 1, last, tools)
            drawn = await self._drawn(before, context, stop)
            text = _until(self._text(drawn), stop)
            words, found = reader.read(text, tools) if reader and calls else (text, [])
            ids = tuple(f"call{self._calls + number:05d}" for number in range(len(found)))
            self._calls += len(found)
            answer = _message(words, found, ids)
            self._keep(before, context, drawn, kind, (*key, identity(answer)), (*read, answer))
            return self._completion(words, tuple(found), ids)

    async def complete(self, prompt: str | Sequence[int], *, stop: tuple[str, ...] = ()) -> Completion:
        """The model's continuation of a plain text, or of token ids. ``stop`` and what it raises: as of ``chat``.

        A plain text that continues from here begins with all that was drawn, the stop text included.
        """
        kind = "text" if isinstance(prompt, str) else "ids"
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        async with self._one_at_a_time:
            before = self._longest(kind, key)
            context = self._plain(key, before)
            drawn = await self._drawn(before, context, stop)
            text = self._text(drawn)
            said = key + text if isinstance(key, str) else (*key, *drawn.token_ids.tolist())
            self._keep(before, context, drawn, kind, said, ())
            return self._completion(_until(text, stop), (), ())

    def sample(self, stop_reason: str) -> Sample:
        """The branch that ends in the newest answer, without the prompt's token ids; empty where nothing was asked."""
        path = self._said[-1].path() if self._said else []
        skipped, at = len(self.prompt.token_ids), 0
        ids, log_probs, mask = [np.empty(0, np.int64)], [np.empty(0, np.float32)], [np.empty(0, bool)]
        turns, spans = list[Turn](), list[WeightSpan]()
        for said in path:
            context = np.array(said.context[skipped:], np.int64)
            skipped, at = 0, at + len(context)
            count = len(said.drawn.token_ids)
            ids += [context, said.drawn.token_ids]
            log_probs += [np.zeros(len(context), np.float32), said.drawn.log_probs]
            mask += [np.zeros(len(context), bool), np.ones(count, bool)]
            turns.append(Turn(at, at + count, said.finish_reason))
            spans += [WeightSpan(span.version, at + span.start, at + span.end) for span in said.drawn.weight_versions]
            at += count
        return Sample(
            token_ids=np.concatenate(ids),
            log_probs=np.concatenate(log_probs),
            temperature=self.temperature,
            seed=self.seed,
            role=self.role,
            finish_reason=path[-1].drawn.finish_reason if path else "abort",
            weight_versions=tuple(spans),
            drawn=np.concatenate(mask),
            turns=tuple(turns),
            stop_reason=stop_reason,
            routes=_routes(path),
            dropped_tokens=self.dropped[1],
            cached_tokens=sum(said.drawn.cached_tokens for said in path),
        )

    def pieces(self, token_ids: np.ndarray) -> list[str]:
        """The text that each of an int array [n] adds."""
        return self._template.tokenizer.pieces(token_ids)

    def check_size(self, count: int) -> None:
        """Refuse a request of ``count`` bytes that is too long by far, before it is read. Raises ``RequestError``."""
        most = _REQUEST_BYTES + _BYTES_PER_TOKEN * self.limits.max_tokens
        if count > most:
            self.ended = "token_limit"
            raise RequestError(
                f"this model's maximum context length is {self.limits.max_tokens} tokens, and a request of "
                f"{count} bytes cannot fit: send at most {most}",
                "context_length_exceeded",
            )

    @property
    def turns_left(self) -> int:
        """Answers that the model may still give."""
        return self.limits.max_turns - len(self._said)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that an environment writes, special tokens spelled out."""
        return self._template.tokenizer.encode_rendered(text)

    @property
    def dropped(self) -> tuple[int, int]:
        """Branches that are not trained on, and the drawn tokens that are on them alone."""
        kept = {id(said) for said in self._said[-1].path()} if self._said else set()
        continued = {id(said.before) for said in self._said}
        ends = [said for said in self._said if id(said) not in continued and id(said) not in kept]
        return len(ends), sum(len(said.drawn.token_ids) for said in self._said if id(said) not in kept)

    def _longest(self, kind: str, key: Sequence[Any]) -> _Said | None:
        """The answer that a conversation continues from: the longest that it begins with, of several the newest."""
        found: _Said | None = None
        for said in reversed(self._said):
            longer = found is None or len(said.key) > len(found.key)
            if longer and said.kind == kind and key[: len(said.key)] == said.key:
                found = said
        return found

    def _plain(self, key: Sequence[Any], before: _Said | None) -> tuple[int, ...]:
        """Token ids of what ``complete`` is asked beyond ``before``."""
        tokenizer = self._template.tokenizer
        rest = key[len(before.key) :] if before else key
        if not isinstance(rest, str):
            tokenizer.check(tuple(rest))
            return tuple(rest)
        if before:
            return self._template.continuing(rest, int(before.drawn.token_ids[-1]))
        if self.prompt.token_ids and rest.startswith(self.prompt.text):  # which they encode
            return self.prompt.token_ids + tokenizer.encode_rendered(rest[len(self.prompt.text) :])
        return tokenizer.encode(rest)

    async def _drawn(self, before: _Said | None, context: tuple[int, ...], stop: tuple[str, ...]) -> Sample:
        """The model's next answer, within the limits."""
        if before is None and context[: len(self.prompt.token_ids)] != self.prompt.token_ids:
            raise RequestError(f"the conversation must begin with prompt {self.prompt.id!r}, as it was given")
        turn = len(self._said)
        if turn >= self.limits.max_turns:
            self.ended = "turn_limit"
            raise RequestError(f"the episode has had its {turn} turns", "turn_limit")
        ids = (*self._ids(before), *context)
        room = self.limits.max_tokens - len(ids)
        if room < 1:
            self.ended = "token_limit"
            raise RequestError(
                # The first words are those that agent frameworks look for.
                f"this model's maximum context length is {self.limits.max_tokens} tokens with the answer; the "
                f"conversation has {len(ids)}",
                "context_length_exceeded",
            )
        if not ids:
            raise RequestError("the conversation has no tokens")
        limit = min(room, self.limits.max_new_tokens)
        asked = replace(self.prompt, token_ids=ids)
        seeds = (turn_seed(self.seed, turn),)
        drawn = await self._draw(
            GenerateRequest(asked, seeds, self.temperature, limit, self.role, self._top_p, self._cuts, stop=stop)
        )
        if drawn.finish_reason == "abort" or not len(drawn.token_ids):
            raise RequestError("the run ended the draw", "aborted", 503)
        if drawn.finish_reason == "length" and limit == room:
            self.ended = "token_limit"
        return drawn

    def _keep(
        self,
        before: _Said | None,
        context: tuple[int, ...],
        drawn: Sample,
        kind: str,
        key: Sequence[Any],
        messages: tuple[Message, ...],
    ) -> None:
        length = (before.length if before else 0) + len(context) + len(drawn.token_ids)
        self._said.append(_Said(before, context, drawn, kind, key, messages, length))

    def _completion(self, text: str, calls: tuple[ToolCall, ...], ids: tuple[str, ...]) -> Completion:
        newest = self._said[-1]
        count = newest.length - len(newest.drawn.token_ids)
        return Completion(text, calls, ids, newest.finish_reason, count, newest.drawn)

    def _text(self, drawn: Sample) -> str:
        return self._template.tokenizer.decode_batch([drawn.token_ids])[0]

    @staticmethod
    def _ids(said: _Said | None) -> list[int]:
        """All token ids up to the end of an answer."""
        path = said.path() if said else []
        return [token for each in path for token in (*each.context, *each.drawn.token_ids.tolist())]


def _until(text: str, stops: tuple[str, ...]) -> str:
    """What stands before the first of the stop texts."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _routes(path: Sequence[_Said]) -> np.ndarray | None:
    """The experts that read each token when the answer behind it was drawn; None where an engine recorded none."""
    read = [said.drawn.routes for said in path]
    kept = [routes for routes in read if routes is not None]
    if not path or len(kept) < len(read):
        return None
    # An answer's last token was read first when the next answer was drawn.
    starts = [0, *(said.length - 1 for said in path[:-1])]
    return np.concatenate([routes[start:] for routes, start in zip(kept, starts, strict=True)])


def _message(words: str, calls: Sequence[ToolCall], ids: Sequence[str]) -> Message:
    """An answer as a message of the conversation."""
    written = [
        {"id": name, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for name, call in zip(ids, calls, strict=True)
    ]
    return {"role": "assistant", "content": words, **({"tool_calls": written} if written else {})}
