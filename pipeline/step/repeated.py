"""Reads the entropy over prompts that are answered at every step with the same seeds: its noise is the policy's alone.

Most of the variance of a reading over the step's own rows comes from which prompts and samples were drawn (on the tasks
of docs/lab.md 84 to 97 %: runs of different methods with the same seed show the same noise). Common random numbers
(Glasserman and Yao 1992, Management Science 38(6)) take that away: a sample changes only where the policy has changed
enough to move its draw to another token. What is left is an offset, since these prompts are not the step's; ``Sensor``
learns it. Exact only with engines that honour a sample's seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline.learner import Learner
from pipeline.step.batch import rows_to_measure
from pipeline.types import SampleGroup, StepStats


def repeated_entropy(groups: Sequence[SampleGroup], learner: Learner) -> float | None:
    """Mean exact entropy at T=1 over the response tokens of ``groups``, nats per token, at the learner's weights.

    One forward pass. None where there are no groups, or one lost its sample: the others alone are another measure.
    """
    rows = [(group.prompt, sample) for group in groups for sample in group.samples if sample.drawn_tokens]
    if not rows or len(rows) < len(groups):
        return None
    return float(learner.statistics(rows_to_measure(rows))["entropy"].double().mean())


def with_repeated(stats: StepStats, entropy: float | None) -> StepStats:
    """``stats`` with ``entropy`` in their reading and among their metrics."""
    reading = replace(stats.entropy, repeated=entropy)
    shown = math.nan if entropy is None else entropy
    return replace(stats, entropy=reading, metrics={**stats.metrics, "entropy_repeated": shown})
