"""Draws the samples of an evaluation while the learner trains on the next step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.rollout.rollouts import Rollouts
from pipeline.types import GenerateRequest, SampleGroup


class DrawnBeside:
    """One evaluation at a time, in a thread of its own.

    Its samples are of one version of the weights: these must not change before ``settle`` has returned.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self._thread = ThreadPoolExecutor(1, "evaluation")
        self._drawn: Future[list[SampleGroup]] | None = None
        self.began = 0.0  # ``time.perf_counter``

    def begin(self, requests: Sequence[GenerateRequest]) -> None:
        """Start to draw."""
        self.began = time.perf_counter()
        self._drawn = self._thread.submit(self._rollouts.generate, requests)

    def settle(self) -> None:
        """Wait until nothing is drawn. Raises what kept samples from being drawn."""
        if self._drawn is not None:
            self._drawn.result()

    def take(self) -> list[SampleGroup] | None:
        """What was drawn, once; None where nothing was begun."""
        drawn, self._drawn = self._drawn, None
        return None if drawn is None else drawn.result()

    def close(self) -> None:
        """End what is being drawn. Idempotent."""
        if self._drawn is not None and not self._drawn.done():
            self._rollouts.abort()
        self._thread.shutdown(cancel_futures=True)
