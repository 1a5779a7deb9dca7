"""The reading over the same prompts and seeds."""

import math

import numpy as np
import pytest

from pipeline.step.repeated import repeated_entropy, with_repeated
from pipeline.types import EntropyReading, Prompt, Role, Sample, SampleGroup, StepStats, WeightSpan


class Oracle:
    """Says of every target that its entropy is the target's own token id."""

    def statistics(self, batch):
        return {"entropy": batch.tokens[batch.loss_mask].float()}


def group(*tokens):
    sample = Sample(
        np.array(tokens),
        np.zeros(len(tokens), np.float32),
        1.0,
        0,
        Role.REPEATED,
        "stop",
        (WeightSpan(0, 0, len(tokens)),),
    )
    return SampleGroup(Prompt("q", (5, 6, 7), "", {}, "exact", {}), (sample,), Role.REPEATED)


def test_it_is_the_mean_over_response_tokens_however_long_the_rows():
    assert repeated_entropy([group(1, 2, 3), group(6)], Oracle()) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "groups",
    [[], [group(1), SampleGroup(group(1).prompt, (), Role.REPEATED)], [group(1), group()]],
    ids=["none", "one lost its sample", "one is empty"],
)
def test_without_every_row_there_is_no_reading(groups):
    assert repeated_entropy(groups, Oracle()) is None


def test_reading_and_metrics_carry_it():
    stats = StepStats(0.0, EntropyReading(30.0, 100.0, 4), 1.0, 1e-3, {"kl": 0.0}, 0.1)
    both = with_repeated(stats, 0.25)
    assert (both.entropy.repeated, both.entropy.mean, both.entropy.step) == (0.25, 0.3, 4)
    assert both.metrics == {"kl": 0.0, "entropy_repeated": 0.25}
    assert stats.entropy.repeated is None
    lost = with_repeated(stats, None)
    assert lost.entropy == stats.entropy
    assert math.isnan(lost.metrics["entropy_repeated"])
