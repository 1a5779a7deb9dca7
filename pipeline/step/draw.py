"""Draws and verifies the samples of one step: main ones at T=1 and auxiliary ones at T+."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.clock import StepClock
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.rewards.stage import VerifierStage, stop_if_none_was_judged
from pipeline.rollout.engine import Finished
from pipeline.rollout.holding import Holding
from pipeline.step.requests import only_fresh, step_requests
from pipeline.step.waiting import Drawn, Rest
from pipeline.types import ControlDecision, GenerateRequest, Role, SampleGroup, StepSamples


@dataclass
class Drawing:
    """The samples of one step while they are drawn: what there is, and what is still to come.

    Groups have numbers, in the order of their requests.
    """

    step: int  # gives the seeds
    version: int  # of the weights that it began with
    decision: ControlDecision  # in force then
    rounds: int = 0  # in which prompts were chosen
    times_held: int = 0  # weight updates that it went through
    stale: int = 0  # samples that were dropped for their weights
    found: dict[int, SampleGroup] = field(default_factory=dict)  # verified
    left: dict[int, GenerateRequest] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Weight updates between its beginning and its step's training."""
        return self.step - self.version

    @classmethod
    def of(cls, drawn: Drawn) -> Drawing:
        """Go on where ``drawn`` was taken."""
        groups, rest = [*drawn.samples.main, *drawn.samples.auxiliary, *drawn.samples.repeated], drawn.rest
        numbers = range(len(groups)) if rest is None else rest.numbers
        drawing = cls(drawn.step, drawn.version, drawn.decision, stale=drawn.samples.stale)
        drawing.found = dict(zip(numbers, groups, strict=True))
        if rest is not None:
            drawing.rounds, drawing.times_held, drawing.left = rest.rounds, rest.times_held, dict(rest.requests)
        return drawing

    def add(self, requests: Sequence[GenerateRequest]) -> None:
        """Ask for more."""
        first = len(self.found) + len(self.left)
        self.left |= dict(enumerate(requests, first))

    def drawn(self) -> Drawn:
        """What there is now; nothing may be under way."""
        numbers = sorted(self.found, key=lambda number: (list(Role).index(self.found[number].role), number))
        main, auxiliary, repeated = (
            [self.found[number] for number in numbers if self.found[number].role is role]
            for role in (Role.MAIN, Role.AUXILIARY, Role.REPEATED)
        )
        rest = Rest(self.rounds, self.times_held, tuple(numbers), dict(self.left)) if self.left else None
        return Drawn(self.version, self.decision, StepSamples(main, auxiliary, self.stale, repeated), self.step, rest)


@dataclass(frozen=True)
class Sampler:
    """Prompts, engines and verifier as one: draws the samples of a step. Several steps may be drawn at once."""

    cursor: DataCursor
    rollouts: Holding
    verifier: VerifierStage
    config: RunConfig
    repeated: Sequence[GenerateRequest] = ()  # asked at every step
    judging: threading.Lock = field(default_factory=threading.Lock)  # one thread at a time
    choosing: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, drawing: Drawing) -> None:
        """Choose the prompts of a round, the next ones of the data.

        Auxiliary and ``repeated`` samples belong to the first round. A prompt that comes up again in the same step, at
        the end of an epoch, is not drawn again: its seeds would be the same.
        """
        first = drawing.rounds == 0
        there: list[SampleGroup | GenerateRequest] = [*drawing.found.values(), *drawing.left.values()]
        seen = {each.prompt.id for each in there if each.role is Role.MAIN}
        with self.choosing:
            prompts = [p for p in self.cursor.take(self.config.rollout.prompts_per_step) if p.id not in seen]
        asked = drawing.decision if first else replace(drawing.decision, auxiliary_prompts=0)
        drawing.add(step_requests(prompts, asked, self.config, drawing.step))
        if first:
            drawing.add(self.repeated)
        drawing.rounds += 1

    def draw(self, drawing: Drawing, clock: StepClock) -> None:
        """Draw ``rollout.prompts_per_step`` prompts, and further ones while too few of their groups teach anything.

        Samples of weights older than those that the step began with are dropped. ``drawing`` always says what there is
        and what is still to come; this goes on from there.

        DAPO's dynamic sampling (arXiv 2503.14476, section 3.2; public code read): a group whose rewards are all equal
        has advantage 0. So prompts are drawn until ``prompts_per_step`` groups differ within, in at most
        ``rollout.sampling_rounds`` rounds. A round begins as soon as those before it cannot suffice, beside what is
        still drawn of them. If too few differ even then, the step goes on with all that were drawn (DAPO's code ends
        the run).
        """
        judged: list[SampleGroup] = []
        while drawing.left or self._lacks(drawing):
            if not drawing.left:
                with clock("sample"):
                    self.ask(drawing)
            judged += self._draw_left(drawing, clock)
        stop_if_none_was_judged(judged, self.config.data)

    def _lacks(self, drawing: Drawing) -> bool:
        """Whether another round is to be drawn, whatever becomes of what is left."""
        if drawing.rounds in (0, self.config.rollout.sampling_rounds):
            return drawing.rounds == 0
        teach = sum(group.role is Role.MAIN and _differs(group) for group in drawing.found.values())
        may_teach = sum(request.role is Role.MAIN for request in drawing.left.values())
        return teach + may_teach < self.config.rollout.prompts_per_step

    def _draw_left(self, drawing: Drawing, clock: StepClock) -> list[SampleGroup]:
        """Draw what is left, and verify groups while others are drawn. Returns those that were judged."""
        stream = self.rollouts.stream(drawing, grows=self.config.rollout.sampling_rounds > 1)
        judged: list[SampleGroup] = []
        while True:
            with clock("sample"):
                some = next(stream, None)
            if some is None:
                return judged
            with clock("verify"):
                judged += self._keep(drawing, some)
            if drawing.left and self._lacks(drawing):
                with clock("sample"):
                    self.ask(drawing)

    def _keep(self, drawing: Drawing, some: Finished) -> list[SampleGroup]:
        """Verify groups, but for those whose samples are only looked at."""
        groups, dropped = only_fresh([group for _, group in some], drawing.version)
        asked = [group for group in groups if group.role is not Role.REPEATED]
        with self.judging:
            verified = self.verifier.verify(asked, more=bool(drawing.found))
        judged = iter(verified)
        for (number, _), group in zip(some, groups, strict=True):
            drawing.found[number] = group if group.role is Role.REPEATED else next(judged)
        drawing.stale += dropped
        return verified


def to_train_on(main: Sequence[SampleGroup], config: RunConfig) -> Sequence[SampleGroup]:
    """The main groups to learn from: all of them.

    With dynamic sampling: the first ``rollout.prompts_per_step`` that differ within, then others where these are few.
    """
    if config.rollout.sampling_rounds == 1:
        return main
    return sorted(main, key=lambda group: not _differs(group))[: config.rollout.prompts_per_step]


def _differs(group: SampleGroup) -> bool:
    return len({sample.reward for sample in group.samples if sample.finish_reason != "abort"}) > 1
