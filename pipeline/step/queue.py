"""Hands out the samples of each step in order; up to ``rollout.staleness`` steps are drawn ahead, while the learner
trains.

With staleness s the samples of step k + s are begun with weights version k, beside the training of step k: a group may
start when accepted + running <= (s + version + 1) x prompts per step, oldest first (AReaL, arXiv 2505.24298, section
5.1). Nothing is left out for its length or age. At a weight update what runs ends first, so that which weights draw
which sample does not depend on anybody's speed; with ``rollout.partial`` it is held, and goes on with the new weights.
A checkpoint holds what is waiting and what is being drawn, so that a resumed run trains on the very same samples.
"""

from __future__ import annotations

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
from pipeline.rollout.holding import Holding
from pipeline.rollout.rollouts import Rollouts
from pipeline.step.batch import build_batch
from pipeline.step.draw import Drawing, Sampler, to_train_on
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
        self._config = config
        rollout = config.rollout
        self._holding = Holding(rollouts, partial=rollout.partial, by_count=rollout.deterministic)
        self._sampler = Sampler(cursor, self._holding, verifier, config, repeated_requests(repeated, config))
        actuator = acting(config.entropy)
        self._second_rollout = actuator is not None and actuator.second_rollout
        self._waiting: deque[_Ahead] = deque()  # the next step's first
        # Steps are drawn one after the other, unless a long response is to hold up none of them.
        self._threads = ThreadPoolExecutor(rollout.staleness + 1 if rollout.partial else 1, "rollouts")

    def next(self, step: int, decision: ControlDecision, clock: StepClock) -> Drawn:
        """The samples of ``step``, whose weights version the engines hold; those of later steps are begun.

        The decision that comes with them is the one they are trained under: with a second rollout the decision that
        drew them, else ``decision``.
        """
        ahead = self._config.rollout.staleness
        self._holding.release()
        for begun in self._waiting:  # before a checkpoint was resumed
            if begun.drawing.left and begun.future is None:
                self._start(begun)
        for later in range(step + len(self._waiting), min(step + ahead + 1, max(self._config.steps, step + 1))):
            self._waiting.append(self._begin(step, later, decision, clock))
        with clock("sample"):
            drawn = self._waiting.popleft().result()
        return drawn if self._second_rollout else replace(drawn, decision=decision)

    def batch(self, drawn: Drawn, step: int) -> TrainBatch:
        """The rows that ``step`` trains on."""
        main = to_train_on(drawn.samples.main, self._config)
        oldest = step - self._config.objective.max_age if self._config.objective.max_age else None
        batch = build_batch(main, drawn.samples.auxiliary, drawn.decision, self._config, oldest)
        return replace(batch, staleness=drawn.samples.ages(step)["mean"])

    def drawn_for(self) -> float:
        """Seconds in which samples were drawn and verified since this was last asked; nothing may be under way."""
        return self._holding.seconds()

    @property
    def held(self) -> int:
        """Responses that are held; nothing may be under way."""
        requests = (request for ahead in self._waiting for request in ahead.drawing.left.values())
        return sum(sample.held for request in requests for sample in request.begun)

    def settle(self) -> None:
        """Wait until nothing is drawn until the next ``next``: only then may the engines' weights change.

        Raises what kept samples from being drawn.
        """
        self._holding.settle()
        for begun in self._waiting:
            if begun.future is not None and begun.future.done():
                begun.result()

    def close(self) -> None:
        """End what is being drawn. Idempotent."""
        self._holding.close()
        self._threads.shutdown(cancel_futures=True)

    def state_dict(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """What waits and what is held, in the two parts that a checkpoint keeps: small fields for its JSON, and arrays.

        Nothing may be under way.
        """
        return plain_of(begun.drawing.drawn() for begun in self._waiting)

    def load_state_dict(self, fields: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        self._waiting = deque(_Ahead(Drawing.of(drawn)) for drawn in drawn_of(fields, arrays))

    def _begin(self, version: int, step: int, decision: ControlDecision, clock: StepClock) -> _Ahead:
        """The samples of a step, drawn now where nothing is drawn ahead, else beside what the caller goes on with."""
        begun = _Ahead(Drawing(step, version, decision))
        if self._config.rollout.staleness:
            if self._config.rollout.partial:  # here, because its threads are in no order
                self._sampler.ask(begun.drawing)
            self._start(begun)
        else:
            self._holding.begin()
            try:
                self._sampler.draw(begun.drawing, clock)
            finally:
                self._holding.end()
        return begun

    def _start(self, begun: _Ahead) -> None:
        self._holding.begin()
        begun.future = self._threads.submit(self._sampler.draw, begun.drawing, StepClock())
        begun.future.add_done_callback(lambda _: self._holding.end())


class _Ahead:
    """One step's samples, which a thread may be drawing."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.future: Future[None] | None = None  # None: they are there, or nobody has begun to draw them

    def result(self) -> Drawn:
        """The samples, once they are there. Raises what kept them from it."""
        if self.future is not None:
            self.future.result()
        return self.drawing.drawn()
