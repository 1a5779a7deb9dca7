"""Draws and verifies the samples of one step: main ones at T=1 and auxiliary ones at T+."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.clock import StepClock
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.rewards.stage import VerifierStage, stop_if_none_was_judged
from pipeline.rollout.rollouts import Rollouts
from pipeline.step.requests import only_fresh, step_requests
from pipeline.types import ControlDecision, GenerateRequest, Role, SampleGroup, StepSamples


@dataclass(frozen=True)
class Sampler:
    """Prompts, engines and verifier as one: draws the samples of a step."""

    cursor: DataCursor
    rollouts: Rollouts
    verifier: VerifierStage
    config: RunConfig
    repeated: Sequence[GenerateRequest] = ()  # asked at every step

    def draw(self, decision: ControlDecision, step: int, version: int, clock: StepClock) -> StepSamples:
        """Draw ``rollout.prompts_per_step`` prompts, and further ones while too few of their groups teach anything.

        ``step`` gives the seeds. The engines hold weights ``version``; samples of older weights are dropped.

        DAPO's dynamic sampling (arXiv 2503.14476, section 3.2; public code read): a group whose rewards are all equal
        has advantage 0. So prompts are drawn until ``prompts_per_step`` groups differ within, in at most
        ``rollout.sampling_rounds`` rounds. If too few differ even then, the step goes on with all that were drawn
        (DAPO's code ends the run). Auxiliary and ``repeated`` samples belong to the first round. A prompt that comes up
        again in the same step, at the end of an epoch, is not drawn again: its seeds would be the same.
        """
        wanted, seen, stale = self.config.rollout.prompts_per_step, set[str](), 0
        main: list[SampleGroup] = []
        auxiliary: list[SampleGroup] = []
        again: list[SampleGroup] = []
        for number in range(self.config.rollout.sampling_rounds):
            with clock("sample"):
                prompts = [prompt for prompt in self.cursor.take(wanted) if prompt.id not in seen]
                seen |= {prompt.id for prompt in prompts}
                asked = decision if number == 0 else replace(decision, auxiliary_prompts=0)
                requests = step_requests(prompts, asked, self.config, step)
            groups, dropped = self._drawn(requests + list(self.repeated) if number == 0 else requests, version, clock)
            stale += dropped
            again += [group for group in groups if group.role is Role.REPEATED]
            groups = [group for group in groups if group.role is not Role.REPEATED]
            stop_if_none_was_judged(groups, self.config.data)
            main += [group for group in groups if group.role is Role.MAIN]
            auxiliary += [group for group in groups if group.role is Role.AUXILIARY]
            if sum(map(_differs, main)) >= wanted:
                break
        return StepSamples(main, auxiliary, stale, again)

    def _drawn(
        self, requests: Sequence[GenerateRequest], version: int, clock: StepClock
    ) -> tuple[list[SampleGroup], int]:
        """The groups in the order of the requests, verified while others are drawn; how many samples were dropped."""
        stream = self.rollouts.stream(requests)
        found: dict[int, SampleGroup] = {}
        stale = 0
        while True:
            with clock("sample"):
                some = next(stream, None)
            if some is None:
                return [found[number] for number in range(len(requests))], stale
            with clock("verify"):
                groups, dropped = only_fresh([group for _, group in some], version)
                asked = [group for group in groups if group.role is not Role.REPEATED]
                judged = iter(self.verifier.verify(asked, more=bool(found)))
                for (number, _), group in zip(some, groups, strict=True):
                    found[number] = group if group.role is Role.REPEATED else next(judged)
            stale += dropped


def to_train_on(main: Sequence[SampleGroup], config: RunConfig) -> Sequence[SampleGroup]:
    """The main groups to learn from: all of them.

    With dynamic sampling: the first ``rollout.prompts_per_step`` that differ within, then others where these are few.
    """
    if config.rollout.sampling_rounds == 1:
        return main
    return sorted(main, key=lambda group: not _differs(group))[: config.rollout.prompts_per_step]


def _differs(group: SampleGroup) -> bool:
    return len({sample.reward for sample in group.samples if sample.finish_reason != "abort"}) > 1
