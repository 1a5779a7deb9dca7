"""Chooses the rollouts that a run writes down, and asks the learner for the entropy at each token that was drawn."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.learner import Learner
from pipeline.step.batch import rows_to_measure
from pipeline.types import KeptSample, Prompt, Sample, StepSamples

MEASURED_EVERY = 10  # steps: a pass through a tiny model costs 5 % of its step, and monitoring may not take 1 %


def choose(samples: StepSamples, count: int, step: int) -> list[tuple[Prompt, Sample]]:
    """At most ``count`` rollouts, of groups spread evenly over main and auxiliary ones.

    Which sample of a group is chosen changes from step to step. Samples without a drawn token (aborted ones) are left
    out.
    """
    groups = [group for group in (*samples.main, *samples.auxiliary) if group.samples]
    drawn = [(group.prompt, group.samples[step % len(group.samples)]) for group in groups]
    drawn = [(prompt, sample) for prompt, sample in drawn if sample.drawn_tokens]
    count = min(count, len(drawn))
    return [drawn[i * (len(drawn) - 1) // max(1, count - 1)] for i in range(count)]


def measure(chosen: Sequence[tuple[Prompt, Sample]], learner: Learner, step: int) -> list[KeptSample]:
    """Add the entropies, which the learner is asked for every tenth step.

    That takes one forward pass over these rows alone: not all of them are trained on.
    """
    if not chosen or step % MEASURED_EVERY:
        return [KeptSample(prompt, sample, None) for prompt, sample in chosen]
    batch = rows_to_measure(chosen)
    entropies = learner.statistics(batch)["entropy"].split(batch.targets.tolist())
    return [
        KeptSample(prompt, sample, values.numpy()) for (prompt, sample), values in zip(chosen, entropies, strict=True)
    ]
