"""Hands out the samples of each step in order, drawn now or up to ``rollout.staleness`` updates ago.

With staleness s the samples of step k + s are drawn at step k, with weights version k, so that engines could work while
the learner trains. Old log-probs are taken from the learner when the samples are drawn, at T=1 and at the weights that
drew them: the loss then sees the ratio as it is, and clips it. A checkpoint holds what is waiting, so that a resumed
run trains on the very same samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.clock import StepClock
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.entropy.actuator import acting
from pipeline.learner import Learner
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
        learner: Learner,
        repeated: Sequence[Prompt] = (),
    ) -> None:
        """``repeated``: prompts that are answered at every step with the same seeds."""
        self._config, self._learner = config, learner
        self._sampler = Sampler(cursor, rollouts, verifier, config, repeated_requests(repeated, config))
        actuator = acting(config.entropy)
        self._second_rollout = actuator is not None and actuator.second_rollout
        self._waiting: deque[Drawn] = deque()  # the next step's first

    def next(self, step: int, decision: ControlDecision, clock: StepClock) -> Drawn:
        """The samples of ``step``, whose weights version the engines hold; first draws those that are to wait.

        The decision that comes with them is the one they are trained under: with a second rollout the decision that
        drew them, else ``decision``.
        """
        while len(self._waiting) <= self._config.rollout.staleness:
            self._waiting.append(self._draw(step, step + len(self._waiting), decision, clock))
        drawn = self._waiting.popleft()
        return drawn if self._second_rollout else replace(drawn, decision=decision)

    def batch(self, drawn: Drawn, step: int) -> TrainBatch:
        """The rows that ``step`` trains on."""
        main = to_train_on(drawn.samples.main, self._config)
        batch = build_batch(main, drawn.samples.auxiliary, drawn.decision, self._config)
        return replace(batch, old_log_probs=drawn.old_log_probs, staleness=step - drawn.version)

    def state_dict(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """What waits, in the two parts that a checkpoint keeps: small fields for its JSON, and arrays."""
        return plain_of(self._waiting)

    def load_state_dict(self, fields: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        self._waiting = deque(drawn_of(fields, arrays))

    def _draw(self, version: int, step: int, decision: ControlDecision, clock: StepClock) -> Drawn:
        drawn = Drawn(version, decision, self._sampler.draw(decision, step, version, clock))
        if step == version:
            return drawn
        with clock("train"):
            log_probs = self._learner.log_probs(self.batch(drawn, version))
        return replace(drawn, old_log_probs=log_probs)
