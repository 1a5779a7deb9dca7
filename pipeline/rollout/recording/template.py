"""Writes what a chat template puts between the model's own words, so that these are never tokenised again.

Rendering a whole conversation anew would not do. The tokens of the model's words need not come back from their text,
and templates change earlier turns: Qwen3's drops their thoughts. So a conversation is rendered as a whole once, before
the first answer. After that only what follows the last answer is rendered: the end of the turn, the new messages, the
beginning of the next turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.data import DataError
from pipeline.data.tokenizer import Message, Tokenizer
from pipeline.rollout.recording.messages import RequestError

# Stands for the model's last words in a rendering; nobody says it.
_ANSWER = "answer0f1d58c72b9e4a36"
# A tool that nobody has, and a call of it: they show what a template does with tools.
PROBE = "probe5e2a91"
PROBE_ARGUMENTS = {"word": "x"}
_SHAPE = {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}, "required": ["word"]}
PROBES = ({"type": "function", "function": {"name": PROBE, "description": "Nothing.", "parameters": _SHAPE}},)
_QUESTION = {"role": "user", "content": "question5e2a91"}


class ConversationTemplate:
    """The chat template of one model: ``text`` (Jinja) or, where that is "", the model's own.

    ``variables`` is what the template reads beside messages and tools (``data.chat_template_kwargs``). Every method
    raises ``RequestError`` where the template refuses the messages.
    """

    def __init__(self, tokenizer: Tokenizer, text: str = "", variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._text, self._variables = text, variables or {}

    @cached_property
    def renders_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        try:
            return PROBE in self.render([_QUESTION], PROBES)
        except RequestError:
            return False

    def probe_call(self) -> tuple[str, ...]:
        """An answer that calls ``PROBE`` with ``PROBE_ARGUMENTS``, as the template writes it.

        First without what stands before and behind an answer, as far as one can tell; then with it.
        """
        call = {"id": "call00000", "type": "function", "function": {"name": PROBE, "arguments": PROBE_ARGUMENTS}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        whole = self.render([_QUESTION, calling], PROBES, answer_next=False)
        behind = whole.rpartition(_QUESTION["content"])[2]
        answer = whole.removeprefix(self.render([_QUESTION], PROBES))
        ids = np.array(self.tokenizer.encode_rendered(answer), np.int64)
        return self.tokenizer.decode_batch([ids])[0], behind

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of a conversation that begins, ready for the model's first answer."""
        return self.tokenizer.encode_rendered(self.render(messages, tools))

    def following(
        self,
        messages: Sequence[Message],
        answered: int,
        last_token: int,
        tools: Sequence[Mapping[str, Any]],
    ) -> tuple[int, ...]:
        """Token ids of what lies between the answer ``messages[answered]`` and the next one.

        ``last_token``: the last one that the model drew. Where it is a token that ends responses and the template ends
        the turn with it, it is not written twice. Where the model drew another end, or was cut, the template's follows.
        """
        end = self._end(last_token)
        return self._behind(self._following(messages, answered, end, tools), end)

    def continuing(self, text: str, last_token: int) -> tuple[int, ...]:
        """Token ids of a plain ``text`` behind an answer; an end that the text repeats is not written twice either."""
        return self._behind(text, self._end(last_token))

    def _behind(self, text: str, end: str) -> tuple[int, ...]:
        """Token ids of a text behind an answer that the model ended with ``end``."""
        before, found, behind = text.partition(end) if end else ("", "", "")
        return self.tokenizer.encode_rendered(behind if found and not before.strip() else text)

    def _end(self, token: int) -> str:
        """The text of a token that ends responses; "" of any other."""
        known = token in self.tokenizer.eos_token_ids
        return "".join(self.tokenizer.pieces(np.array([token], np.int64))) if known else ""

    def _following(
        self, messages: Sequence[Message], answered: int, end: str, tools: Sequence[Mapping[str, Any]]
    ) -> str:
        """What the template writes behind an answer that the model ended with ``end``."""
        before, answer, new = messages[:answered], messages[answered], messages[answered + 1 :]
        plain = {"role": "assistant", "content": _ANSWER}
        if not answer.get("tool_calls"):
            return _rest(self.render([*before, plain, *new], tools))
        # What a template writes behind calls may depend on them. So they stay, the model's words being in the last
        # call's arguments; what closes the calls is cut off, for the model wrote that itself.
        *earlier, last = answer["tool_calls"]
        said = {"name": last["function"]["name"], "arguments": {"answer": _ANSWER}}
        calling = {**answer, "content": "", "tool_calls": [*earlier, {**last, "function": said}]}
        closed = _rest(self.render([*before, calling], tools, answer_next=False))
        whole = _rest(self.render([*before, calling, *new], tools))
        if not whole.startswith(closed):
            raise RequestError("the chat template writes a turn with tool calls otherwise once messages follow it")
        if end and end in closed:
            return end + closed.rpartition(end)[2] + whole[len(closed) :]
        return _rest(self.render([*before, plain], tools, answer_next=False)) + whole[len(closed) :]

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, answer_next: bool = True
    ) -> str:
        """The whole conversation as text; ``answer_next``: with the beginning of the model's next turn."""
        try:
            return self.tokenizer.render_chat(
                messages, template=self._text, variables=self._variables, tools=tools, answer_next=answer_next
            )
        except DataError as error:
            raise RequestError(str(error)) from error


def _rest(rendered: str) -> str:
    """What follows the stand-in for the model's words."""
    if rendered.count(_ANSWER) != 1:
        raise RequestError(f"the chat template writes an answer {rendered.count(_ANSWER)} times, not once")
    return rendered.partition(_ANSWER)[2]
