"""The training loop: one step of GRPO with entropy control, as it reads in the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pipeline.checkpoints import CheckpointStore
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.entropy.band import Band
from pipeline.entropy.controller import EntropyController
from pipeline.evaluation.beside import DrawnBeside
from pipeline.evaluation.evaluate import EvaluationResult, evaluate, evaluation_requests, judged
from pipeline.learner import Learner
from pipeline.monitoring.recorder import Recorder
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.rollouts import Rollouts
from pipeline.step.batch import positives_consumed
from pipeline.step.kept import choose, measure
from pipeline.step.prepare import prepare
from pipeline.step.queue import RolloutQueue
from pipeline.step.repeated import repeated_entropy, with_repeated
from pipeline.types import ControlDecision, Prompt, StepOutcome


class LoopState(msgspec.Struct):
    """What a checkpoint keeps beside the learner and the arrays of what waits."""

    step: int
    cursor: dict[str, Any]
    controller: dict[str, Any]
    decision: ControlDecision
    queue: list[dict[str, Any]]
    evaluation_due: bool


@dataclass
class TrainingLoop:
    """Everything a run is made of, wired by ``launchers.run.assemble``; ``step`` counts the updates done."""

    config: RunConfig
    rollouts: Rollouts
    learner: Learner
    verifier: VerifierStage
    cursor: DataCursor
    queue: RolloutQueue
    band: Band
    controller: EntropyController
    held_out: Sequence[Prompt]
    recorder: Recorder
    checkpoints: CheckpointStore
    decision: ControlDecision
    drawn_beside: DrawnBeside
    step: int = 0
    evaluation_due: bool = False  # of the weights in force: beside the next step, or by a longer run

    def run(self, stop_requested: Callable[[], bool]) -> None:
        """Train until ``config.steps`` or until asked to stop; either way the last step ends in a checkpoint.

        A run that fails lets a checkpoint in the making be completed.
        """
        try:
            self._run(stop_requested)
        except Exception:
            self.checkpoints.wait()
            raise

    def _run(self, stop_requested: Callable[[], bool]) -> None:
        self.rollouts.push(self.step)
        due = self.evaluation_due or (self.step == 0 and self.config.evaluation.at_start)
        if due and not stop_requested():
            self.evaluate()
        while self.step < self.config.steps and not stop_requested():
            self.train_step()
            self.finish_evaluation()
            self.record_saved(wait=False)
            if self._falls_on(self.config.evaluation.every):
                self.evaluate()
            if self._falls_on(self.config.checkpoint.every) and self.step < self.config.steps:
                self.save()
        self.save()
        self.record_saved(wait=True)
        if self.step == self.config.steps and self.config.evaluation.at_end:
            self.evaluate_now()

    def _falls_on(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def train_step(self) -> None:
        """Sample, verify, learn, hand the weights over, decide the next temperature."""
        clock = self.recorder.clock()
        drawn = self.queue.next(self.step, self.decision, clock)
        samples = drawn.samples
        self.begin_evaluation()
        with clock("batch"):
            batch = self.queue.batch(drawn, self.step)
            chosen = choose(samples, self.config.monitoring.samples_per_step, self.step)
        with clock("train"), self.rollouts.training(self.step + 1):
            batch = prepare(batch, self.learner, self.config, self.step)
            kept = measure(chosen, self.learner, self.step)
            repeated = repeated_entropy(samples.repeated, self.learner)
            stats = self.learner.update(batch, self.step)
            if samples.repeated:
                stats = with_repeated(stats, repeated)
        with clock("sample"):
            self.drawn_beside.settle()
            self.queue.settle()
        with clock("sync"):
            self.rollouts.push(self.step + 1)
        positives = positives_consumed(batch)
        self.decision = self.controller.update(stats.entropy, positives)
        outcome = StepOutcome(
            step=self.step,
            samples=samples,
            kept=kept,
            stats=stats,
            decision=drawn.decision,
            following=self.decision,
            band=self.band.at(self.step),
            positives=positives,
            rollouts=self.rollouts.figures(),
            drawing_s=self.queue.drawn_for(),
            held=self.queue.held,
            busy=self.rollouts.busy(),
        )
        self.recorder.step(outcome)
        self.step += 1

    def evaluate(self) -> None:
        """pass@k on the held-out prompts with the current weights: now, or beside the next step's training.

        After the last step it stays due: whoever lengthens the run makes it as a run of that length would have.
        """
        if self.config.evaluation.beside_training or self.step == self.config.steps:
            self.evaluation_due = True
        else:
            self.evaluate_now()

    def evaluate_now(self) -> None:
        """Evaluate while nothing trains."""
        self.evaluation_due = False
        self.recorder.begin("evaluation")
        result = evaluate(self.rollouts.generate, self.verifier, self.held_out, self.config, self.step)
        self.evaluated(self.step, result)

    def begin_evaluation(self) -> None:
        """Have the samples of an evaluation that is due drawn beside what follows."""
        if self.evaluation_due:
            self.drawn_beside.begin(evaluation_requests(self.held_out, self.config, self.step))
            self.evaluation_due = False

    def finish_evaluation(self) -> None:
        """Judge and record what was drawn beside the step before, with the weights that this step began with."""
        groups = self.drawn_beside.take()
        if groups is None:
            return
        version = self.step - 1
        if all(sample.drawn_with(version) for group in groups for sample in group.samples):
            self.recorder.begin("evaluation")
            self.evaluated(version, judged(groups, self.verifier, self.config, self.drawn_beside.began))
        else:  # an engine that was started again has the learner's weights of the moment
            self.recorder.fault(f"the evaluation of version {version} mixed versions: {self.step} is evaluated instead")
            self.evaluate_now()

    def evaluated(self, step: int, result: EvaluationResult) -> None:
        """Record an evaluation after ``step`` updates; a band that waits for one learns of it.

        Not of one after the last step, which is of this run's end alone: a longer run makes it again if it is due.
        """
        self.recorder.evaluation(step, result.to_dict())
        if step == self.config.steps:
            return
        watching = self.band.watching
        self.band.evaluated(step, result.pass_at_k)
        if watching and not self.band.watching:
            self.recorder.band(step, self.band.at(self.step), self.band.why)

    def save(self) -> None:
        """Begin a checkpoint of learner, controller, data cursor, what waits and the pending decision.

        The one before is completed first; this one is written while training goes on.
        """
        self.recorder.begin("checkpoint")
        self.record_saved(wait=True)
        self.recorder.snapshot(self.step)
        waiting, arrays = self.queue.state_dict()
        state = {
            "step": self.step,
            "cursor": self.cursor.state_dict(),
            "controller": self.controller.state_dict(),
            "decision": vars(self.decision),
            "queue": waiting,
            "evaluation_due": self.evaluation_due,
        }
        self.checkpoints.save(self.step, state, arrays, self.learner.save)

    def record_saved(self, *, wait: bool) -> None:
        """Record the checkpoint in the making when it is complete; raises what kept it from being written."""
        if (saved := self.checkpoints.finished(wait=wait)) is not None:
            self.recorder.checkpoint(saved)
