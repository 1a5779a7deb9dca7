"""What a worker process does with one episode: calls the environment with a client that is bound to the episode."""

from __future__ import annotations

import asyncio
import traceback
from contextlib import suppress

from pipeline.config.schema import DataConfig
from pipeline.data import DataError
from pipeline.rewards.pool import describe
from pipeline.rewards.worker import lead_guarded_group
from pipeline.rollout.environment import RewardError, environment_of, reward_of
from pipeline.types import Prompt

# What workers are forked with. A client imports its resources at its first request: 0.2 CPU-s of an episode's own time.
PRELOADED = (__name__, "openai", "openai.resources")


def begin(data: DataConfig) -> None:
    """Lead a guarded group, and load the environment outside any time limit.

    What the import raises, the first episode raises again and reports.
    """
    lead_guarded_group()
    with suppress(DataError, ImportError):
        environment_of(data).load(data)


def play(data: DataConfig, prompt: Prompt, url: str, key: str) -> float | str:
    """The reward of one episode, or why there is none.

    Nothing else leaves the process: an exception of the client cannot be pickled, nor can whatever an environment
    returns, and either would end the other episodes too.
    """
    try:
        return reward_of(asyncio.run(_played(data, prompt, url, key)))
    except RewardError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001  an environment may raise anything; this process has no other task
        error.traceback = traceback.format_exc()  # type: ignore[attr-defined]  # as pebble leaves it for ``describe``
        return describe(error)


async def _played(data: DataConfig, prompt: Prompt, url: str, key: str) -> object:
    import openai

    # No time limit and no second try: the run has its own, and a turn may wait for a busy engine.
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=None) as client:
        return await environment_of(data).run(client, prompt, data)
