"""What one step draws: main and auxiliary samples, verified; with dynamic sampling, in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.clock import StepClock
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.rollouts import Rollouts
from pipeline.step.requests import only_fresh, step_requests
from pipeline.types import ControlDecision, GenerateRequest, Role, SampleGroup


@dataclass(frozen=True)
class StepSamples:
    """Verified samples of one step."""

    main: Sequence[SampleGroup]  # all that were drawn: what rewards, lengths and token counts are measured on
    auxiliary: Sequence[SampleGroup]
    stale: int  # samples dropped for their weight version
    repeated: Sequence[SampleGroup] = ()  # not verified


def draw_step(
    cursor: DataCursor,
    rollouts: Rollouts,
    verifier: VerifierStage,
    decision: ControlDecision,
    config: RunConfig,
    step: int,
    version: int,
    clock: StepClock,
    repeated: Sequence[GenerateRequest] = (),
) -> StepSamples:
    """Draw ``rollout.prompts_per_step`` prompts, and further ones while too few of their groups teach anything.

    ``step`` gives the seeds, ``version`` is that of the weights that the engines hold; samples of others are dropped.

    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2; public code read): a group whose rewards are all equal has advantage 0,
    so prompts are drawn until ``prompts_per_step`` groups differ within, in at most ``rollout.sampling_rounds`` rounds. If they are still too
    few the step goes on, filled up with the first groups that do not (that code ends the run). Auxiliary samples and the
    ``repeated`` ones belong to the first round. A prompt that comes up again in the same step, at the end of an epoch, is not drawn again: its seeds would be the same.
    """
    wanted, seen, stale = config.rollout.prompts_per_step, set[str](), 0
    main: list[SampleGroup] = []
    auxiliary: list[SampleGroup] = []
    again: list[SampleGroup] = []
    for number in range(config.rollout.sampling_rounds):
        with clock("sample"):
            prompts = [prompt for prompt in cursor.take(wanted) if prompt.id not in seen]
            seen |= {prompt.id for prompt in prompts}
            asked = decision if number == 0 else replace(decision, auxiliary_prompts=0)
            requests = step_requests(prompts, asked, config, step)
            groups = rollouts.generate(requests + list(repeated) if number == 0 else requests)
            groups, dropped = only_fresh(groups, version)
            stale += dropped
            again += [group for group in groups if group.role is Role.REPEATED]
        with clock("verify"):
            groups = verifier.verify([group for group in groups if group.role is not Role.REPEATED])
        main += [group for group in groups if group.role is Role.MAIN]
        auxiliary += [group for group in groups if group.role is Role.AUXILIARY]
        if sum(map(_differs, main)) >= wanted:
            break
    return StepSamples(main, auxiliary, stale, again)


def to_train_on(main: Sequence[SampleGroup], config: RunConfig) -> Sequence[SampleGroup]:
    """The main groups to learn from: all; with dynamic sampling the first that differ within, then others where those are too few."""
    if config.rollout.sampling_rounds == 1:
        return main
    return sorted(main, key=lambda group: not _differs(group))[: config.rollout.prompts_per_step]


def _differs(group: SampleGroup) -> bool:
    return len({sample.reward for sample in group.samples if sample.finish_reason != "abort"}) > 1
