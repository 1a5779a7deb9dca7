"""Hands out the samples of each step in order; up to ``rollout.staleness`` steps are drawn ahead, while the learner
trains.

With staleness s the samples of step k + s are drawn with weights version k, beside the training of step k: a group may
start when accepted + running <= (s + version + 1) x prompts per step, oldest first (AReaL, arXiv 2505.24298, section
5.1). Nothing is left out for its length or age. Weights wait until what runs is finished, so which weights draw which
sample does not depend on anybody's speed. A checkpoint holds what is waiting, so that a resumed run trains on the very
same samples.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.clock import StepClock
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.entropy.actuator import acting
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.rollouts import Rollouts
from pipeline.step.batch import build_batch
from pipeline.step.draw import Sampler, to_train_on
from pipeline.step.requests import repeated_requests
from pipeline.step.waiting import Drawn, drawn_of, plain_of
from pipeline.types import ControlDecision, Prompt, TrainBatch


class RolloutQueue:
    """Draws ahead as far as ``rollout.staleness`` allows, and hands out the samples of one step after the other."""

    def __init__(
        self,
        config: RunConfig,
        cursor: DataCursor,
        rollouts: Rollouts,
        verifier: VerifierStage,
        repeated: Sequence[Prompt] = (),
    ) -> None:
        """``repeated``: prompts that are answered at every step with the same seeds."""
        self._config, self._rollouts = config, rollouts
        self._sampler = Sampler(cursor, rollouts, verifier, config, repeated_requests(repeated, config))
        actuator = acting(config.entropy)
        self._second_rollout = actuator is not None and actuator.second_rollout
        self._waiting: deque[Future[Drawn]] = deque()  # the next step's first
        self._thread = ThreadPoolExecutor(1, "rollouts")  # one step after the other
        self._drawing_s = 0.0  # since drawn_for was last asked

    def next(self, step: int, decision: ControlDecision, clock: StepClock) -> Drawn:
        """The samples of ``step``, whose weights version the engines hold; those of later steps are begun.

        The decision that comes with them is the one they are trained under: with a second rollout the decision that
        drew them, else ``decision``.
        """
        ahead = self._config.rollout.staleness
        for later in range(step + len(self._waiting), min(step + ahead + 1, max(self._config.steps, step + 1))):
            self._waiting.append(self._begin(step, later, decision, clock if not ahead else StepClock()))
        with clock("sample"):
            drawn = self._waiting.popleft().result()
        return drawn if self._second_rollout else replace(drawn, decision=decision)

    def batch(self, drawn: Drawn, step: int) -> TrainBatch:
        """The rows that ``step`` trains on."""
        main = to_train_on(drawn.samples.main, self._config)
        batch = build_batch(main, drawn.samples.auxiliary, drawn.decision, self._config)
        return replace(batch, staleness=drawn.samples.ages(step)["mean"])

    def drawn_for(self) -> float:
        """Seconds in which samples were drawn and verified since this was last asked; nothing may be under way."""
        seconds, self._drawing_s = self._drawing_s, 0.0
        return seconds

    def settle(self) -> None:
        """Wait until all that was begun is drawn: only then may the engines' weights change."""
        for future in self._waiting:
            future.result()

    def close(self) -> None:
        """End what is being drawn. Idempotent."""
        if any(not future.done() for future in self._waiting):
            self._rollouts.abort()
        self._thread.shutdown(cancel_futures=True)

    def state_dict(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """What waits, in the two parts that a checkpoint keeps: small fields for its JSON, and arrays."""
        return plain_of(future.result() for future in self._waiting)

    def load_state_dict(self, fields: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        self._waiting = deque(map(_done, drawn_of(fields, arrays)))

    def _begin(self, version: int, step: int, decision: ControlDecision, clock: StepClock) -> Future[Drawn]:
        """The samples of a step, drawn now where nothing is drawn ahead, else beside what the caller goes on with."""
        if not self._config.rollout.staleness:
            return _done(self._draw(version, step, decision, clock))
        return self._thread.submit(self._draw, version, step, decision, clock)

    def _draw(self, version: int, step: int, decision: ControlDecision, clock: StepClock) -> Drawn:
        started = time.monotonic()
        drawn = Drawn(version, decision, self._sampler.draw(decision, step, version, clock))
        self._drawing_s += time.monotonic() - started
        return drawn


def _done(drawn: Drawn) -> Future[Drawn]:
    future: Future[Drawn] = Future()
    future.set_result(drawn)
    return future
