"""A user's own ``async def run(client, prompt, meta) -> reward``; ``client`` is an ``openai.AsyncOpenAI`` of the
episode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.data import DataError
from pipeline.rewards.own_function import own_function
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
    """What the function returns."""
    return await load(data)(client, prompt, prompt.meta)
