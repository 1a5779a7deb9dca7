"""An environment of the library ``verifiers`` by name, with its own rewards.

Source: PyPI ``verifiers`` 0.1, ``Environment.run_rollout``. A prompt is handed over as a row of its dataset.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.data import DataError
from pipeline.data.environment_rows import verifiers_environment
from pipeline.rollout.environment import tool_problems
from pipeline.types import Prompt

APART = True
NEEDS = {"verifiers": "verifiers"}
PRELOADED = ("datasets", "verifiers.clients", "verifiers.utils.env_utils")  # the package itself loads these when asked
_NO_ANSWER = "EmptyModelResponseError"  # the model said nothing: its own fault, not the environment's


def problems(config: RunConfig) -> Iterator[Problem]:
    """Whether the environment can be loaded, and judges an answer without its group."""
    given = config.data.environment
    if not given.id:
        remedy = "name the environment, e.g. data.environment.id=my_environment with my_environment.py beside this file"
        yield Problem("data.environment.id", given.id, "which environment?", remedy)
        return
    try:
        environment = load(config.data)
    except DataError as error:
        remedy = "install its package, or put a module with load_environment beside the configuration file"
        yield Problem("data.environment.id", given.id, str(error), remedy)
        return
    if environment.requires_group_rollouts:
        remedy = "use rewards that judge one answer; groups are compared by objective.advantage"
        yield Problem("data.environment.id", given.id, "its rubric judges whole groups", remedy)
    if tools := getattr(environment, "tool_defs", None):
        yield from tool_problems(
            config, [{"type": "function", "function": tool.model_dump(exclude_none=True)} for tool in tools]
        )


def load(data: DataConfig) -> Any:
    """The environment. Raises ``DataError``."""
    return verifiers_environment(data)


async def run(client: Any, prompt: Prompt, data: DataConfig) -> object:
    """What its rubric gives. Raises ``RuntimeError`` with the error that the environment met."""
    from verifiers.clients import OpenAIChatCompletionsClient, OpenAICompletionsClient

    kind = OpenAIChatCompletionsClient if data.chat_template else OpenAICompletionsClient
    row = {"example_id": 0, **prompt.meta, "prompt": list(prompt.messages), "answer": prompt.answer}
    output = await load(data).run_rollout(row, kind(client), "policy", {})
    error = output.get("error")
    if error and error["error"] == _NO_ANSWER:
        return 0.0
    if error:
        raise RuntimeError(error["error_chain_str"])
    return output["reward"]
