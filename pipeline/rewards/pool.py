"""Verifiers in processes of their own: a call that hangs, raises or kills its process costs that one sample only."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, wait
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from pipeline.rewards.verifier import library_of, make_verifier
from pipeline.rewards.verifiers._function import NoRewardError
from pipeline.rewards.worker import begin
from pipeline.types import Prompt

Outcome = float | str  # a reward, or why there is none
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_LONGEST_ERROR = 200  # characters
_TOGETHER = 25  # references tried in one task: handing over a task costs as much as reading a short reference


class VerifierPool:
    """``workers`` processes (0: as many as CPUs) that run one verifier, each call limited to ``timeout`` seconds.

    Workers are forked from a server process that has the verifier's library loaded and nothing of the driver (no CUDA,
    no threads), so replacing a killed one takes milliseconds. A worker takes along whatever processes a verifier has
    started in it. ``folder``: where the verifier's module is looked for first. Raises what the verifier's import
    raises.
    """

    def __init__(self, verifier: str, folder: str, workers: int, timeout: float) -> None:
        self.timeout = timeout
        self._named = (verifier, folder)
        self._workers = workers or len(os.sched_getaffinity(0))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, library_of(verifier)])
        self._start = partial(ProcessPool, self._workers, initializer=begin, initargs=self._named, context=context)
        self._pool = self._start()
        # Import before the first timed call. No time limit: a slow disk is no fault of a sample.
        self._pool.schedule(_load, self._named).result()

    def scores(self, calls: Sequence[tuple[Prompt, str]], budget: float, spent: float) -> list[Outcome]:
        """One outcome per (prompt, response text), in order. Never raises on account of a verifier.

        What is not judged within ``budget`` seconds, of which ``spent`` are gone, has no verdict.
        """
        late = f"no verdict: the {budget:.3g} s for the step's responses were used up (data.verifier_budget_s)"
        outcomes = self._run(_score, calls, budget - spent)
        return [late if outcome is None else outcome for outcome in outcomes]

    def budget(self, calls: int) -> float:
        """Seconds within which ``calls`` are judged, or are not: six time limits, and a twentieth of one for each call
        of a worker. So a worker may be held up by some that hang, and the others may take a twentieth of the limit.
        """
        return self.timeout * (6 + calls / self._workers / 20)

    def refusals(self, prompts: Sequence[Prompt]) -> list[str]:
        """For every prompt why its reference cannot be matched, or ""; an error or a time limit is a reason too."""
        batches = [prompts[start : start + _TOGETHER] for start in range(0, len(prompts), _TOGETHER)]
        found: list[Any] = self._run(_refusals, [(batch,) for batch in batches], inf)
        reasons: list[str] = []
        for batch, reason in zip(batches, found, strict=True):
            one_by_one = isinstance(reason, str) and self._run(_refusals, [([prompt],) for prompt in batch], inf)
            reasons += [each if isinstance(each, str) else each[0] for each in one_by_one] if one_by_one else reason
        return reasons

    def _run(self, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """What ``work`` returned for each call; a string says why it did not, None that its time was used up."""
        end = time.monotonic() + seconds
        futures = [self._submit(work, call) for call in calls]
        outcomes = [self._outcome(future, end) for future in futures]
        for index, outcome in enumerate(outcomes):
            if outcome is _LOST:  # the whole pool broke: run what it lost one at a time, so that only the culprit fails
                outcomes[index] = self._outcome(self._submit(work, calls[index]), end)
        if None in outcomes:
            self.close()  # else workers would go on with calls that nobody waits for
        return ["verifier process died" if outcome is _LOST else outcome for outcome in outcomes]

    def close(self) -> None:
        """Kill the workers."""
        self._pool.stop()
        self._pool.join()

    def _submit(self, work: Callable[..., Any], call: tuple[Any, ...]) -> ProcessFuture[Any]:
        if not self._pool.active:
            self.close()
            self._pool = self._start()
        return self._pool.schedule(work, (*self._named, *call), timeout=self.timeout)

    def _outcome(self, future: ProcessFuture[Any], end: float) -> Any:
        """What a call returned or why it did not; ``_LOST`` when the pool broke under it, None when ``end`` came."""
        while not wait([future], timeout=max(0.0, min(1.0, end - time.monotonic()))).done:
            if not self._pool.active:  # a broken pool leaves the futures it had not dispatched yet undone for ever
                return _LOST
            if time.monotonic() >= end:
                return None
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, BrokenExecutor):
            return _LOST
        if isinstance(error, ProcessExpired):
            return f"verifier process died (exit code {error.exitcode})"
        if isinstance(error, TimeoutError):
            return f"no verdict within {self.timeout:g} s"
        return describe(error)


_LOST = object()  # the outcome of a call whose pool broke


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


def _load(verifier: str, folder: str) -> None:
    make_verifier(verifier, folder)


def _score(verifier: str, folder: str, prompt: Prompt, text: str) -> Outcome:
    try:
        return float(make_verifier(verifier, folder).score(prompt, text))
    except NoRewardError as error:
        return str(error)  # without a place of ours: it names the user's


def _refusals(verifier: str, folder: str, prompts: Sequence[Prompt]) -> list[str]:
    return [make_verifier(verifier, folder).refusal(prompt) for prompt in prompts]
