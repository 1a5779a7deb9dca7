"""The training loop: one step of GRPO with entropy control, as it reads in the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.checkpoints import CheckpointStore
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.entropy.controller import EntropyController
from pipeline.evaluation.evaluate import evaluate
from pipeline.learner import Learner
from pipeline.monitoring.recorder import Recorder, StepClock
from pipeline.objectives.batch import build_batch, positives_consumed
from pipeline.objectives.prepare import prepare
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.rollouts import Rollouts
from pipeline.rollout.step import draw_step
from pipeline.types import ControlDecision, Prompt


@dataclass
class TrainingLoop:
    """Everything a run is made of, wired by ``launchers.assemble``; ``step`` counts the updates done."""

    config: RunConfig
    rollouts: Rollouts
    learner: Learner
    verifier: VerifierStage
    cursor: DataCursor
    controller: EntropyController
    held_out: Sequence[Prompt]
    recorder: Recorder
    checkpoints: CheckpointStore
    pad_token_id: int
    decision: ControlDecision
    step: int = 0

    def run(self, stop_requested: Callable[[], bool]) -> None:
        """Train until ``config.steps`` or until asked to stop; either way the last step ends in a checkpoint."""
        self.rollouts.push(self.step)
        if self.step == 0 and self.config.evaluation.at_start and not stop_requested():
            self.evaluate()
        while self.step < self.config.steps and not stop_requested():
            self.train_step()
            for every, act in (
                (self.config.evaluation.every, self.evaluate),
                (self.config.checkpoint.every, self.save),
            ):
                if every and self.step % every == 0 and self.step < self.config.steps:
                    act()
        self.save()
        if self.step == self.config.steps and self.config.evaluation.at_end:
            self.evaluate()

    def train_step(self) -> None:
        """Sample, verify, learn, hand the weights over, decide the next temperature."""
        clock, decision = StepClock(), self.decision
        parts = self.cursor, self.rollouts, self.verifier
        drawn = draw_step(*parts, decision, self.config, step=self.step, version=self.step, clock=clock)
        with clock("batch"):
            batch = build_batch(drawn.trained, drawn.auxiliary, decision, self.config, self.pad_token_id)
        with clock("train"):
            batch = prepare(batch, self.learner, self.config, self.step)
            stats = self.learner.update(batch, self.step)
        with clock("sync"):
            self.rollouts.push(self.step + 1)
        positives = positives_consumed(batch)
        self.decision = self.controller.update(stats.entropy, positives)
        self.recorder.step(
            self.step, drawn.main, drawn.auxiliary, stats, decision, self.decision, drawn.stale, positives, clock
        )
        self.step += 1

    def evaluate(self) -> None:
        """pass@k on the held-out prompts with the current weights."""
        result = evaluate(self.rollouts.generate, self.verifier, self.held_out, self.config, self.step)
        self.recorder.evaluation(self.step, result.to_dict())

    def save(self) -> None:
        """Checkpoint learner, controller, data cursor and the pending decision under one manifest."""
        state = {"step": self.step, "cursor": self.cursor.state_dict(), "controller": self.controller.state_dict()}
        self.recorder.checkpoint(
            self.checkpoints.save(self.step, state | {"decision": vars(self.decision)}, self.learner.save)
        )
