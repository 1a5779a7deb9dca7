"""An environment by its name: a file of ``environments``; what it is given, and what may come back.

A module of ``environments`` has

- ``problems(config)``: why a run with it could not start, as ``Problem``;
- ``APART``: whether it runs a user's code, hence in processes of its own; then also ``load(data)``, which a process
  calls once, outside any time limit;
- where it needs a library: ``NEEDS``, from packages to the extras that have them, and ``PRELOADED``, the modules that
  its processes are forked with;
- ``async run(...) -> reward``: plays one episode. With ``APART`` it is called with ``(client, prompt, data)``, where
  ``client`` is an ``openai.AsyncOpenAI`` of the episode; else with ``(recording, prompt, data)``.

A reward is a number in [0, 1], or a list with one number per turn. Those of a list are added, and the sum must be in
[0, 1]. An episode's ``stop_reason`` is one of ``STOP_REASONS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from types import ModuleType
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.load import resolve_path
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.data import DataError
from pipeline.data.sources import template_text
from pipeline.data.tokenizer import load_tokenizer
from pipeline.registry import load
from pipeline.rollout.recording.messages import RequestError, read_tools
from pipeline.rollout.recording.template import ConversationTemplate
from pipeline.rollout.recording.tool_calls import ToolCallReader
from pipeline.types import Prompt

PACKAGE = "pipeline.rollout.environments"
STOP_REASONS = {
    "done": "the environment gave its reward",
    "turn_limit": "it asked for more than data.environment.max_turns answers",
    "token_limit": "the conversation was as long as data.environment.max_tokens",
    "environment_error": "the environment raised, died, or gave no reward in [0, 1]",
    "timeout": "the environment's own code took longer than data.environment.timeout_s or turn_timeout_s",
}


class RewardError(ValueError):
    """An environment gave what is no reward."""


def environment_of(data: DataConfig) -> ModuleType:
    """The module of the environment."""
    return load(PACKAGE, data.environment.name)


def environment_problems(config: RunConfig) -> Iterator[Problem]:
    """Why no episode could begin: packages, and what the environment itself says."""
    module = environment_of(config.data)
    needed = {"aiohttp": "episodes", "openai": "episodes"} if module.APART else {}
    needed |= getattr(module, "NEEDS", {})
    missing = [(package, extra) for package, extra in needed.items() if importlib.util.find_spec(package) is None]
    for package, extra in missing:
        yield Problem(
            "data.environment.name",
            config.data.environment.name,
            f"the package {package} is not installed",
            f"pip install 'isentrope[{extra}]'",
        )
    if not missing:
        yield from module.problems(config)


def tool_problems(config: RunConfig, tools: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Whether the model can be shown an environment's tools, in OpenAI's form, and its calls be read."""
    if not config.data.chat_template:
        yield Problem("data.chat_template", False, "the environment has tools", "set data.chat_template=true")
        return
    data, folder = config.data, resolve_path(config.model.hf_path)
    try:
        template = ConversationTemplate(
            load_tokenizer(folder), template_text(data.chat_template_file), data.chat_template_kwargs
        )
        ToolCallReader(template)
        template.render([{"role": "user", "content": "?"}], read_tools(tools))
    except (DataError, RequestError) as error:
        remedy = "use a model whose chat template shows tools, or an environment without tools"
        yield Problem("data.environment.name", data.environment.name, str(error), remedy)


def reward_of(given: object) -> float:
    """The reward that an environment's answer stands for. Raises ``RewardError`` saying what it is instead."""
    if not is_reward(given):
        raise RewardError(
            f"the environment gave a {type(given).__name__} as reward: give a number in [0, 1], or several"
        )
    total = sum(map(float, _parts(given)))
    if not 0.0 <= total <= 1.0:
        raise RewardError(f"reward {total} is outside [0, 1]")
    return total


def is_reward(given: object) -> bool:
    """Whether it is a number, or a list of numbers; numpy's scalars are among them."""
    return all(isinstance(part, Real) for part in _parts(given))


def _parts(given: object) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]


def to_play(prompt: Prompt, data: DataConfig) -> Prompt:
    """The prompt as an episode is about it.

    Where a client composes the messages, also the first ones, the conversation need not begin with the prompt's token
    ids: there are none then, and a sample holds the whole conversation.
    """
    if not environment_of(data).APART and not prompt.messages:
        return prompt
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    return Prompt(prompt.id, (), prompt.text, prompt.answer, prompt.verifier, prompt.meta, messages)
