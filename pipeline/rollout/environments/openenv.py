"""An environment behind an OpenEnv server: reset, then a step with each answer, or each call of a tool, until it is
done.

Source: PyPI ``openenv-core`` 0.3, ``GenericEnvClient`` (a WebSocket, one session for each episode). ``reset`` is given
the prompt's ``meta``; rewards of the steps are added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import httpx

from pipeline.config.errors import Problem
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.data import DataError
from pipeline.rollout.environment import tool_problems
from pipeline.types import Prompt

APART = True
NEEDS = {"openenv": "openenv"}
PRELOADED = ("openenv.core.generic_client",)
ANSWER, OBSERVATION = "message", ""  # fields that hold them, where data.environment.params names none
_OF_A_CALL = {"type", "tool_name", "arguments", "metadata"}  # fields of ``openenv.core``'s CallToolAction
_LIST_TOOLS = {"type": "list_tools"}
_LIMITS = ("turn_limit", "context_length_exceeded")
_ASKING_S = 10.0


def problems(config: RunConfig) -> Iterator[Problem]:
    """Whether a server answers, and takes an answer in the field that is named, or calls that the model can write."""
    given = config.data.environment
    for name, value in given.params.items():
        if name not in ("answer", "observation") or not isinstance(value, str):
            remedy = "parameters are answer and observation: fields of the environment's actions and observations"
            yield Problem(f"data.environment.params.{name}", value, "not a parameter of openenv", remedy)
    try:
        fields = _action_fields(given.id)
        tools = _listed_tools(config.data) if fields <= _OF_A_CALL else []
    except DataError as error:
        remedy = "start the server and write its address, e.g. data.environment.id=http://127.0.0.1:8000"
        yield Problem("data.environment.id", given.id, str(error), remedy)
        return
    answer = given.params.get("answer", ANSWER)
    if not fields <= _OF_A_CALL:
        if answer not in fields:
            known = ", ".join(sorted(fields - {"metadata"}))
            yield Problem("data.environment.params.answer", answer, "actions have no such field", f"use one of {known}")
        return
    if "answer" in given.params:
        yield Problem("data.environment.params.answer", answer, "actions are calls of the server's tools", "remove it")
    if not tools:
        yield Problem("data.environment.id", given.id, "the server takes calls and lists no tool", "give it tools")
    else:
        yield from tool_problems(config, tools)


def load(data: DataConfig) -> Any:
    """The client's class, and whether the server's actions are calls of its tools. Raises ``DataError``."""
    from openenv.core.generic_client import GenericEnvClient

    return GenericEnvClient, _takes_calls(data.environment.id)


@cache
def _takes_calls(address: str) -> bool:
    return _action_fields(address) <= _OF_A_CALL


def _action_fields(address: str) -> set[str]:
    """Names of the fields of a server's actions. Raises ``DataError`` where none answers."""
    try:
        schema = httpx.get(f"{address.rstrip('/')}/schema", timeout=_ASKING_S).raise_for_status().json()
        return set(schema["action"]["properties"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise DataError(f"no OpenEnv server answers there ({type(error).__name__}: {error})") from error


def _listed_tools(data: DataConfig) -> list[dict[str, Any]]:
    """The tools that a server lists, in OpenAI's form. Raises ``DataError``."""
    from openenv.core.generic_client import GenericEnvClient
    from websockets.exceptions import WebSocketException

    try:
        with GenericEnvClient(base_url=data.environment.id, message_timeout_s=_ASKING_S).sync() as server:
            return _offered(server.step(_LIST_TOOLS).observation)
    except (OSError, RuntimeError, KeyError, TypeError, WebSocketException) as error:
        raise DataError(f"the server cannot list its tools ({type(error).__name__}: {error})") from error


def _offered(observation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of a ListToolsObservation, in OpenAI's form."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
            },
        }
        for tool in observation["tools"]
    ]


async def run(client: Any, prompt: Prompt, data: DataConfig) -> list[float]:
    """The reward of each step. An episode that meets a limit keeps what it has."""
    import openai

    made, takes_calls = load(data)
    rewards: list[float] = []
    try:
        async with made(base_url=data.environment.id, message_timeout_s=data.environment.timeout_s) as server:
            play = _by_calls if takes_calls else _by_answers
            async for result in play(server, client, prompt, data):
                rewards.append(0.0 if result.reward is None else result.reward)
    except openai.BadRequestError as error:
        if error.code not in _LIMITS:
            raise
    return rewards


async def _by_answers(server: Any, client: Any, prompt: Prompt, data: DataConfig) -> Any:
    """What each step gives: the action holds an answer of the model."""
    params = data.environment.params
    said = _Said(client, data)
    result = await server.reset(**prompt.meta)
    while not result.done:
        answer = await said.next(_shown(result.observation, params.get("observation", OBSERVATION)))
        result = await server.step({params.get("answer", ANSWER): answer})
        yield result


async def _by_calls(server: Any, client: Any, prompt: Prompt, data: DataConfig) -> Any:
    """What each step gives: a call of one of its tools. An answer without a call ends the episode."""
    tools = _offered((await server.step(_LIST_TOOLS)).observation)
    result = await server.reset(**prompt.meta)
    messages: list[Any] = list(prompt.messages)
    if result.observation:
        shown = _shown(result.observation, data.environment.params.get("observation", OBSERVATION))
        messages = [*_system(data), {"role": "user", "content": shown}]
    while not result.done:
        drawn = await client.chat.completions.create(model="policy", messages=messages, tools=tools)
        messages.append(drawn.choices[0].message)
        for call in messages[-1].tool_calls or ():
            action = {"tool_name": call.function.name, "arguments": json.loads(call.function.arguments)}
            result = await server.step({"type": "call_tool", **action})
            yield result
            if result.done:
                return
            messages.append({"role": "tool", "tool_call_id": call.id, "content": _returned(result.observation)})
        if messages[-1] is drawn.choices[0].message:
            return


class _Said:
    """The conversation so far; a model without a chat template reads it as one text."""

    def __init__(self, client: Any, data: DataConfig) -> None:
        self._client, self._chat = client, data.chat_template
        self._messages = _system(data)
        self._text = ""

    async def next(self, observation: str) -> str:
        """The model's answer to an observation."""
        if not self._chat:
            self._text += observation
            drawn = await self._client.completions.create(model="policy", prompt=self._text)
            self._text += drawn.choices[0].text
            return drawn.choices[0].text
        self._messages.append({"role": "user", "content": observation})
        drawn = await self._client.chat.completions.create(model="policy", messages=self._messages)
        answer = drawn.choices[0].message.content or ""
        self._messages.append({"role": "assistant", "content": answer})
        return answer


def _system(data: DataConfig) -> list[dict[str, str]]:
    return [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []


def _shown(observation: Mapping[str, Any], field: str) -> str:
    """An observation as the model reads it: the field that is named, or the whole as JSON."""
    if field and field not in observation:
        raise KeyError(
            f"data.environment.params.observation={field}: the observation has {', '.join(observation) or 'no field'}"
        )
    return _text(observation[field] if field else observation)


def _returned(observation: Mapping[str, Any]) -> str:
    """What a call gave, as the model reads it: a CallToolObservation's error, or its result."""
    if error := observation.get("error"):
        return f"error: {error['message']}"
    result = observation.get("result", observation)
    if isinstance(result, Mapping) and "content" in result:  # as MCP has it, with the value beside the parts
        parts: Sequence[Mapping[str, Any]] = result["content"]
        result = "\n".join(part["text"] for part in parts if "text" in part)
    return _text(result)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
