import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objectives.mismatch import BINS, LARGEST, RELATIVE_ERROR, SMALLEST, mismatch_sums, quantile

distances = st.lists(st.floats(-LARGEST, LARGEST), min_size=1, max_size=60)


def sums_of(values, main=None):
    ratio = torch.tensor(values, dtype=torch.float64)
    return mismatch_sums(ratio, torch.ones(len(ratio), dtype=torch.bool) if main is None else torch.tensor(main))


def quantile_of(values, q):
    sums = sums_of(values)
    return quantile([sums[name].item() for name in BINS], q, sums["mismatch_max"].item())


def test_sums_by_hand():
    """d = ln 2 and ln 1/2: k3 is exp(d) - 1 - d, k1 is -d."""
    sums = sums_of([math.log(2), -math.log(2), 9.0], [True, True, False])
    assert sums["mismatch_sum"].item() == pytest.approx(2 * math.log(2))
    assert sums["mismatch_max"].item() == pytest.approx(math.log(2))
    assert sums["mismatch_kl_sum"].item() == pytest.approx((1 - math.log(2)) + (-0.5 + math.log(2)))
    assert sums["mismatch_kl_k1_sum"].item() == pytest.approx(0, abs=1e-12)
    assert sum(sums[name].item() for name in BINS) == 2


def test_kl_estimates_meet_the_divergence():
    """Over the engine's whole distribution, each outcome as often as its probability, both are the KL divergence
    itself.
    """
    engine, learner = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    drawn = torch.tensor([0, 0, 1, 2])
    sums = sums_of((learner.log() - engine.log())[drawn].tolist())
    kl = (engine * (engine / learner).log()).sum().item()
    assert sums["mismatch_kl_sum"].item() / 4 == pytest.approx(kl)
    assert sums["mismatch_kl_k1_sum"].item() / 4 == pytest.approx(kl)


def test_a_tail_of_one_in_a_hundred():
    """99 tokens of 1e-3 and one of 2: the 99th percentile is still 1e-3; with two of 2 it is not."""
    assert quantile_of([1e-3] * 99 + [2.0], 0.99) == pytest.approx(1e-3, rel=RELATIVE_ERROR)
    assert quantile_of([1e-3] * 98 + [2.0] * 2, 0.99) == pytest.approx(2.0, rel=RELATIVE_ERROR)


@given(distances, st.floats(0.01, 1.0))
def test_error_of_the_quantile_is_bounded(values, q):
    found = quantile_of(values, q)
    exact = np.quantile(np.abs(values), q, method="inverted_cdf")
    if exact <= SMALLEST:
        assert found == 0
    else:
        assert abs(found - exact) <= RELATIVE_ERROR * exact * (1 + 1e-9)


@given(distances, distances)
def test_counts_of_parts_add_up(first, second):
    whole, parts = sums_of(first + second), (sums_of(first), sums_of(second))
    assert all(whole[name] == parts[0][name] + parts[1][name] for name in BINS)


def test_outside_the_limits():
    assert quantile_of([1e-9] * 5, 0.99) == 0
    assert quantile_of([3000.0, 1.0], 0.99) == 3000.0
    assert math.isnan(quantile_of([], 0.99))
    assert sums_of([math.nan])[BINS[-1]].item() == 1  # not lost among the small ones
