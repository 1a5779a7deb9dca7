"""An environment behind an OpenEnv server: reset, then a step with each answer, until it is done.

Source: PyPI ``openenv-core`` 0.3, ``GenericEnvClient`` (a WebSocket, one session for each episode). ``reset`` is given
the prompt's ``meta``; rewards of the steps are added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from pipeline.config.errors import Problem
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.types import Prompt

APART = True
NEEDS = {"openenv": "openenv"}
PRELOADED = ("openenv.core.generic_client",)
ANSWER, OBSERVATION = "message", ""  # fields that hold them, where data.environment.params names none
_LIMITS = ("turn_limit", "context_length_exceeded")
_ASKING_S = 10.0


def problems(config: RunConfig) -> Iterator[Problem]:
    """Whether a server answers, and takes an answer in the field that is named."""
    given = config.data.environment
    for name, value in given.params.items():
        if name not in ("answer", "observation") or not isinstance(value, str):
            remedy = "parameters are answer and observation: fields of the environment's actions and observations"
            yield Problem(f"data.environment.params.{name}", value, "not a parameter of openenv", remedy)
    try:
        schema = httpx.get(f"{given.id.rstrip('/')}/schema", timeout=_ASKING_S).raise_for_status().json()
        fields = schema["action"]["properties"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        remedy = "start the server and write its address, e.g. data.environment.id=http://127.0.0.1:8000"
        problem = f"no OpenEnv server answers there ({type(error).__name__}: {error})"
        yield Problem("data.environment.id", given.id, problem, remedy)
        return
    answer = given.params.get("answer", ANSWER)
    if answer not in fields:
        known = ", ".join(name for name in fields if name != "metadata")
        yield Problem("data.environment.params.answer", answer, "actions have no such field", f"use one of {known}")


def load(data: DataConfig) -> Any:
    """The client's class."""
    from openenv.core.generic_client import GenericEnvClient

    return GenericEnvClient


async def run(client: Any, prompt: Prompt, data: DataConfig) -> list[float]:
    """The reward of each step. An episode that meets a limit keeps what it has."""
    import openai

    given = data.environment
    answered = given.params.get("answer", ANSWER)
    rewards: list[float] = []
    said = _Said(client, data)
    async with load(data)(base_url=given.id, message_timeout_s=given.timeout_s) as server:
        result = await server.reset(**prompt.meta)
        while not result.done:
            try:
                answer = await said.next(_shown(result.observation, given.params.get("observation", OBSERVATION)))
            except openai.BadRequestError as error:
                if error.code not in _LIMITS:
                    raise
                break
            result = await server.step({answered: answer})
            rewards.append(0.0 if result.reward is None else result.reward)
    return rewards


class _Said:
    """The conversation so far; a model without a chat template reads it as one text."""

    def __init__(self, client: Any, data: DataConfig) -> None:
        self._client, self._chat = client, data.chat_template
        self._messages = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
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


def _shown(observation: Mapping[str, Any], field: str) -> str:
    """An observation as the model reads it: the field that is named, or the whole as JSON."""
    if field and field not in observation:
        raise KeyError(
            f"data.environment.params.observation={field}: the observation has {', '.join(observation) or 'no field'}"
        )
    shown = observation[field] if field else observation
    return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
