"""What the coming steps will train on: drawn now, or up to ``rollout.staleness`` updates ago.

With staleness s the samples of step k + s are drawn at step k, with weights version k, so that engines could work while the learner trains.
Old log-probs are taken from the learner when the samples are drawn, at T=1 and at the weights that drew them: the loss then sees the
ratio as it is, and clips it. A checkpoint holds what is waiting, so that a resumed run trains on the very same samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.clock import StepClock
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.entropy.actuators import acting
from pipeline.learner import Learner
from pipeline.objectives.batch import build_batch
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.rollouts import Rollouts
from pipeline.step.draw import StepSamples, draw_step, to_train_on
from pipeline.step.requests import repeated_requests
from pipeline.types import ControlDecision, Prompt, Role, Sample, SampleGroup, TrainBatch, WeightSpan


@dataclass(frozen=True)
class Drawn:
    """Samples of one step, and what they were drawn with."""

    version: int  # of the weights
    decision: ControlDecision  # in force at the time
    samples: StepSamples
    old_log_probs: torch.Tensor | None = (
        None  # float32 [rows, seq - 1] at T=1, of the batch made of them; None: on-policy
    )


class RolloutQueue:
    """Draws, verifies and hands out the samples of each step, in order."""

    def __init__(
        self,
        config: RunConfig,
        cursor: DataCursor,
        rollouts: Rollouts,
        verifier: VerifierStage,
        learner: Learner,
        pad_token_id: int,
        repeated: Sequence[Prompt] = (),
    ) -> None:
        """``repeated``: prompts that are answered at every step with the same seeds."""
        self._config, self._cursor, self._rollouts = config, cursor, rollouts
        self._verifier, self._learner, self._pad = verifier, learner, pad_token_id
        actuator = acting(config.entropy)
        self._second_rollout = actuator is not None and actuator.second_rollout
        self._repeated = repeated_requests(repeated, config)
        self._waiting: deque[Drawn] = deque()  # the next step's first

    def next(self, step: int, decision: ControlDecision, clock: StepClock) -> Drawn:
        """The samples of ``step``, whose weights version the engines hold; first draws those that are to wait.

        The decision that comes with them is the one they are trained under: of a second rollout the one that drew it, else
        ``decision``.
        """
        while len(self._waiting) <= self._config.rollout.staleness:
            self._waiting.append(self._draw(step, step + len(self._waiting), decision, clock))
        drawn = self._waiting.popleft()
        return drawn if self._second_rollout else replace(drawn, decision=decision)

    def batch(self, drawn: Drawn, step: int) -> TrainBatch:
        """The rows that ``step`` trains on."""
        main = to_train_on(drawn.samples.main, self._config)
        batch = build_batch(main, drawn.samples.auxiliary, drawn.decision, self._config, self._pad)
        return replace(batch, old_log_probs=drawn.old_log_probs, staleness=step - drawn.version)

    def state_dict(self) -> list[dict[str, Any]]:
        """What waits, JSON-serialisable."""
        return [_plain(drawn) for drawn in self._waiting]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        self._waiting = deque(map(_drawn, state))

    def _draw(self, version: int, step: int, decision: ControlDecision, clock: StepClock) -> Drawn:
        parts = self._cursor, self._rollouts, self._verifier
        samples = draw_step(*parts, decision, self._config, step, version, clock, self._repeated)
        drawn = Drawn(version, decision, samples)
        if step == version:
            return drawn
        with clock("train"):
            log_probs = self._learner.log_probs(self.batch(drawn, version))
        return replace(drawn, old_log_probs=log_probs)


def _plain(drawn: Drawn) -> dict[str, Any]:
    old = drawn.old_log_probs
    return {
        "version": drawn.version,
        "decision": asdict(drawn.decision),
        "main": [_plain_group(group) for group in drawn.samples.main],
        "auxiliary": [_plain_group(group) for group in drawn.samples.auxiliary],
        "repeated": [_plain_group(group) for group in drawn.samples.repeated],
        "stale": drawn.samples.stale,
        "old_log_probs": None if old is None else old.tolist(),
    }


def _plain_group(group: SampleGroup) -> dict[str, Any]:
    samples = [
        vars(sample)
        | {"token_ids": sample.token_ids.tolist(), "log_probs": sample.log_probs.tolist(), "role": str(sample.role)}
        | {"weight_versions": [vars(span) for span in sample.weight_versions]}
        for sample in group.samples
    ]
    return {"prompt": vars(group.prompt), "samples": samples, "role": str(group.role)}


def _drawn(state: dict[str, Any]) -> Drawn:
    old = state["old_log_probs"]
    return Drawn(
        state["version"],
        ControlDecision(**state["decision"]),
        StepSamples(
            list(map(_group, state["main"])),
            list(map(_group, state["auxiliary"])),
            state["stale"],
            list(map(_group, state.get("repeated", []))),  # older checkpoints have none
        ),
        None if old is None else torch.tensor(old, dtype=torch.float32),
    )


def _group(state: dict[str, Any]) -> SampleGroup:
    samples = tuple(
        Sample(
            **sample
            | {"token_ids": np.array(sample["token_ids"], np.int64), "role": Role(sample["role"])}
            | {"log_probs": np.array(sample["log_probs"], np.float32)}
            | {"weight_versions": tuple(WeightSpan(**span) for span in sample["weight_versions"])}
        )
        for sample in state["samples"]
    )
    prompt = state["prompt"] | {"token_ids": tuple(state["prompt"]["token_ids"])}
    return SampleGroup(Prompt(**prompt), samples, Role(state["role"]))
