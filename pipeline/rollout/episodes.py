"""Plays episodes: an environment on one side, the engines on the other, a recording in between."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from pebble import ProcessExpired, ProcessPool

from pipeline.config.schema import DataConfig, EnvironmentConfig, RunConfig
from pipeline.data.sources import template_text
from pipeline.data.tokenizer import Tokenizer
from pipeline.rewards.pool import describe
from pipeline.rollout import episode_worker
from pipeline.rollout.engine import Finished, in_order
from pipeline.rollout.environment import RewardError, environment_of, reward_of, to_play
from pipeline.rollout.recording.recording import Limits, Recording
from pipeline.rollout.recording.template import ConversationTemplate
from pipeline.rollout.turns import PATIENCE_S, Turns
from pipeline.types import GenerateRequest, Prompt, Role, Sample, SampleGroup

Stream = Callable[[Sequence[GenerateRequest]], Iterator[Finished]]
MODEL = "policy"  # what clients call the model
_STARTING_S = 0.02  # between two looks at whether a process has begun with its episode
WAVES = 32  # of turns at a time, where an engine takes what comes


class Episodes:
    """Draws requests as episodes of the run's environment.

    An episode fails alone: whatever the environment does ends that episode with a stop reason, and reward 0 unless it
    gave one. What an engine raises ends the run.

    Args:
        config: of the run.
        tokenizer: of the model.
        answers: draws single answers, see ``Rollouts.stream``.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, answers: Stream) -> None:
        self._config, self._answers = config, answers
        self._environment = environment_of(config.data)
        data = config.data
        self._template = ConversationTemplate(
            tokenizer, template_text(data.chat_template_file), data.chat_template_kwargs
        )
        limits = config.data.environment
        self._limits = Limits(config.rollout.max_new_tokens, config.longest_row, limits.max_turns)
        serial = config.rollout.engine == "native"
        patience_s = math.inf if serial and not self._environment.APART else PATIENCE_S
        self._turns = Turns(answers, patience_s=patience_s, together=1 if serial else WAVES)
        self._closing = ExitStack()
        self._closing.callback(self._turns.close)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._thread.start()
        self._closing.callback(self._stop_loop)
        self._apart = _Apart(data) if self._environment.APART else None
        if self._apart:
            self._closing.callback(self._apart.close)
        self._free = asyncio.Semaphore(limits.concurrency if self._apart else 2**20)

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """Every group as its episodes end. Repeated requests are single answers: their noise must be the policy's.

        Raises what an engine raised.
        """
        plain = [number for number, request in enumerate(requests) if request.role is Role.REPEATED]
        if plain:
            for answered in self._answers([requests[number] for number in plain]):
                yield [(plain[number], group) for number, group in answered]
        numbers = [number for number, request in enumerate(requests) if request.role is not Role.REPEATED]
        arrived: SimpleQueue[Finished | BaseException] = SimpleQueue()
        with self._turns.playing(sum(len(requests[number].seeds) for number in numbers)) as ended:
            for number in numbers:
                asyncio.run_coroutine_threadsafe(self._deliver(number, requests[number], ended, arrived), self._loop)
            for _ in numbers:
                some = arrived.get()
                if isinstance(some, BaseException):
                    raise some
                yield some

    def generate(self, requests: Sequence[GenerateRequest]) -> list[SampleGroup]:
        """As ``stream``: one group per request, in order, once all episodes have ended."""
        return in_order(self.stream(requests), len(requests))

    def close(self) -> None:
        """End what plays. Idempotent."""
        self._closing.close()

    async def _deliver(
        self,
        number: int,
        request: GenerateRequest,
        ended: Callable[[], None],
        arrived: SimpleQueue[Finished | BaseException],
    ) -> None:
        try:
            prompt = to_play(request.prompt, self._config.data)
            alone = [replace(each, prompt=prompt) for each in _apart_by_sample(request)]
            samples = tuple(await asyncio.gather(*(self._play(each, ended) for each in alone)))
        except BaseException as error:  # noqa: BLE001  raised where the group is waited for
            arrived.put(error)
        else:
            arrived.put([(number, SampleGroup(prompt, samples, request.role))])

    async def _play(self, request: GenerateRequest, ended: Callable[[], None]) -> Sample:
        """The episode under the request's one seed."""
        try:
            async with self._free:
                return await self._episode(request)
        finally:
            ended()

    async def _episode(self, request: GenerateRequest) -> Sample:
        watch = _Watch(self._config.data.environment)

        async def draw(asked: GenerateRequest) -> Sample:
            with watch.paused():
                return await asyncio.wrap_future(self._turns.ask(asked))

        recording = Recording(
            request.prompt,
            self._template,
            draw,
            seed=request.seeds[0],
            temperature=request.temperature,
            limits=self._limits,
            role=request.role,
            top_p=request.top_p,
            cuts=request.cuts,
        )
        if self._apart is None:
            playing: Awaitable[Any] = self._environment.run(recording, request.prompt, self._config.data)
        else:
            playing = self._apart.play(recording, request.prompt, watch)
        outcome = await _outcome(asyncio.ensure_future(playing), recording, watch)
        if self._turns.failed is not None:
            raise self._turns.failed
        sample = recording.sample(outcome.stop_reason)
        return replace(sample, reward=outcome.reward, correct=outcome.reward == 1.0, verifier_error=outcome.error)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def _apart_by_sample(request: GenerateRequest) -> Iterator[GenerateRequest]:
    """A request for each sample; the last ones of a group are those that are cut."""
    for number, seed in enumerate(request.seeds, start=1):
        cuts = replace(request.cuts, samples=1) if request.cuts and number > request.usual else None
        yield replace(request, seeds=(seed,), cuts=cuts)


@dataclass(frozen=True)
class _Outcome:
    """How an episode ended."""

    reward: float
    stop_reason: str
    error: str = ""  # why there is no reward


async def _outcome(playing: asyncio.Future[Any], recording: Recording, watch: _Watch) -> _Outcome:
    """Wait for an environment's reward as long as it may take, and say what came of it."""
    while not playing.done():
        left_s = watch.left_s()
        if left_s <= 0:
            playing.cancel()
            return _Outcome(0.0, "timeout", f"no reward: {watch.told()}")
        await asyncio.wait({playing}, timeout=left_s)
    try:
        return _Outcome(reward_of(await playing), recording.ended or "done")
    except RewardError as error:
        return _Outcome(0.0, "environment_error", str(error))
    except _NoRewardError as error:
        return _Outcome(0.0, recording.ended) if recording.ended else _Outcome(0.0, "environment_error", str(error))
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  an environment may raise anything
        if recording.ended:  # it was refused an answer beyond its limits
            return _Outcome(0.0, recording.ended)
        return _Outcome(0.0, "environment_error", describe(error))


class _NoRewardError(RuntimeError):
    """An environment's process says why it has no reward."""


class _Watch:
    """How long an environment's own code has run: the time in which no answer is drawn."""

    def __init__(self, limits: EnvironmentConfig) -> None:
        self._limits = limits
        self._pauses = 0
        self._since = time.monotonic()  # the start, or the last answer
        self._spent_s = 0.0  # before that

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the time is not the environment's: an answer is drawn, or its process starts."""
        if not self._pauses:
            self._spent_s += time.monotonic() - self._since
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._since = time.monotonic()

    def left_s(self) -> float:
        """Seconds until a limit may be met."""
        if self._pauses:
            return min(self._limits.turn_timeout_s, self._limits.timeout_s)
        turn_s = time.monotonic() - self._since
        return min(self._limits.turn_timeout_s - turn_s, self._limits.timeout_s - self._spent_s - turn_s)

    def told(self) -> str:
        """Which limit was met."""
        turn_s = time.monotonic() - self._since
        if turn_s >= self._limits.turn_timeout_s:
            return f"{self._limits.turn_timeout_s:g} s between two answers (data.environment.turn_timeout_s)"
        return f"{self._limits.timeout_s:g} s of its own (data.environment.timeout_s)"


class _Apart:
    """A user's environment, each episode in a process of its own, which can be killed."""

    def __init__(self, data: DataConfig) -> None:
        from pipeline.rollout.recording.endpoint import Endpoint

        self._data = data
        self._endpoint = Endpoint(MODEL)
        self._url = self._endpoint.start()
        # Forked from a server that has the client's library loaded and nothing of the driver (no CUDA, no threads).
        context = multiprocessing.get_context("forkserver")
        own = getattr(environment_of(data), "PRELOADED", ())
        context.set_forkserver_preload([*episode_worker.PRELOADED, *own])
        workers = data.environment.concurrency
        self._start = partial(ProcessPool, workers, initializer=episode_worker.begin, initargs=(data,), context=context)
        self._pool = self._start()

    async def play(self, recording: Recording, prompt: Prompt, watch: _Watch) -> Any:
        """The reward that the environment gives. Cancelled, it kills the environment's process."""
        if not self._pool.active:
            self._pool = self._start()
        key = self._endpoint.open(recording)
        try:
            task = self._pool.schedule(episode_worker.play, args=(self._data, prompt, self._url, key))
            with watch.paused():
                while not (task.running() or task.done()):
                    await asyncio.sleep(_STARTING_S)
            given = await asyncio.wrap_future(task)
            if isinstance(given, str):
                raise _NoRewardError(given)
            return given
        except ProcessExpired as error:
            raise _NoRewardError(f"the environment's process died (exit code {error.exitcode})") from error
        finally:
            self._endpoint.close_episode(key)

    def close(self) -> None:
        """Kill the processes and stop serving."""
        self._pool.stop()
        self._pool.join()
        self._endpoint.close()
