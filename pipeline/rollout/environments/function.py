"""A user's own ``async def run(client, prompt, meta) -> reward``; ``client`` is an ``openai.AsyncOpenAI`` of the
episode.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.data import DataError
from pipeline.rewards.own_function import own_function, returned
from pipeline.rollout.environment import RewardError, is_reward
from pipeline.types import Prompt

APART = True


def problems(config: RunConfig) -> Iterator[Problem]:
    """Whether the function is there and can be called so."""
    try:
        load(config.data)
    except DataError as error:
        remedy = "write data.environment.id=module:function, with the module beside the configuration file"
        yield Problem("data.environment.id", config.data.environment.id, str(error), remedy)


def load(data: DataConfig) -> Any:
    """The function, its module imported. Raises ``DataError``."""
    name = data.environment.id
    return own_function(name, data.verifier_folder, f"environment {name!r}", ("client", "prompt", "meta"))


async def run(client: Any, prompt: Prompt, data: DataConfig) -> object:
    """The reward that the function returns. Raises ``RewardError`` that names the function where it is none."""
    name, function = data.environment.id, load(data)
    given = function(client, prompt, prompt.meta)
    if not inspect.isawaitable(given):
        wanted = f"what can be awaited, by 'async def {name.rpartition(':')[2]}'"
        raise RewardError(returned(name, function, given, wanted))
    reward = await given
    if not is_reward(reward):
        raise RewardError(returned(name, function, reward, "a number in [0, 1], or a list of them, one per turn"))
    return reward
