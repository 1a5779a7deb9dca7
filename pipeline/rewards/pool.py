"""Verifiers in processes of their own: a call that hangs, raises or kills its process costs that one sample only."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from pipeline.rewards.verifier import library_of, make_verifier
from pipeline.types import Prompt

Outcome = float | str  # a reward, or why there is none
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_LONGEST_ERROR = 200  # characters


class VerifierPool:
    """``workers`` processes (0: as many as CPUs) that run one verifier, each call limited to ``timeout`` seconds.

    Workers are forked from a server process that has the verifier's library loaded and nothing of the driver (no CUDA,
    no threads), so replacing a killed one takes milliseconds. Raises what the verifier's import raises.
    """

    def __init__(self, verifier: str, workers: int, timeout: float) -> None:
        self.verifier = verifier
        self.timeout = timeout
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, library_of(verifier)])
        self._start = partial(ProcessPool, max_workers=workers or len(os.sched_getaffinity(0)), context=context)
        self._pool = self._start()
        # Import before the first timed call. No time limit: a slow disk is no fault of a sample.
        self._pool.schedule(_load, (verifier,)).result()

    def scores(self, calls: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        """One outcome per (prompt, response text), in order. Never raises on account of a verifier."""
        return self._run(_score, calls)

    def refusals(self, prompts: Sequence[Prompt]) -> list[str]:
        """For every prompt why its reference cannot be matched, or ""; an error or a time limit is a reason too."""
        return [str(outcome) for outcome in self._run(_refusal, [(prompt,) for prompt in prompts])]

    def _run(self, work: Callable[..., Outcome], calls: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        futures = [self._submit(work, call) for call in calls]
        outcomes = [self._outcome(future) for future in futures]
        for index, outcome in enumerate(outcomes):
            if outcome is None:  # the whole pool broke: run what it lost one at a time, so that only the culprit fails
                outcomes[index] = self._outcome(self._submit(work, calls[index]))
        return ["verifier process died" if outcome is None else outcome for outcome in outcomes]

    def close(self) -> None:
        """Kill the workers."""
        self._pool.stop()
        self._pool.join()

    def _submit(self, work: Callable[..., Outcome], call: tuple[Any, ...]) -> ProcessFuture[Outcome]:
        if not self._pool.active:
            self.close()
            self._pool = self._start()
        return self._pool.schedule(work, (self.verifier, *call), timeout=self.timeout)

    def _outcome(self, future: ProcessFuture[Outcome]) -> Outcome | None:
        """Reward or error of a call; None when the pool broke under it."""
        while not wait([future], timeout=1.0).done:
            if not self._pool.active:  # a broken pool leaves the futures it had not dispatched yet undone for ever
                return None
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, BrokenExecutor):
            return None
        if isinstance(error, ProcessExpired):
            return f"verifier process died (exit code {error.exitcode})"
        if isinstance(error, TimeoutError):
            return f"no verdict within {self.timeout:g} s"
        return describe(error)


def describe(error: BaseException) -> str:
    """One short line for an exception, also for one of a user's own class that cannot be printed; with its place."""
    try:
        message = str(error)
    except Exception as own:  # noqa: BLE001  a verifier's exception may do anything when it is asked for its text
        message = f"its text cannot be read ({type(own).__name__})"
    return f"{type(error).__name__}: {message}".split("\n")[0][:_LONGEST_ERROR] + _place(error)


def _place(error: BaseException) -> str:
    """The file and line that raised an exception in a worker, as pebble brings its traceback along; "" without one."""
    frames = _FRAME.findall(str(getattr(error, "traceback", "")))
    return f" ({Path(frames[-1][0]).name}, line {frames[-1][1]})" if frames else ""


def _load(verifier: str) -> None:
    make_verifier(verifier)


def _score(verifier: str, prompt: Prompt, text: str) -> float:
    return float(make_verifier(verifier).score(prompt, text))


def _refusal(verifier: str, prompt: Prompt) -> str:
    return make_verifier(verifier).refusal(prompt)
