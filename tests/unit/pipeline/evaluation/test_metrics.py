import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.metrics import distinct_correct, maj_at_k, pass_at_k, pass_interval

counts = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), min_size=1, max_size=6), st.integers(1, n))
)


def test_pass_at_k_by_hand():
    # n = 4: c = 1 gives 1 - C(3,2)/C(4,2) = 1 - 3/6; c = 3 leaves fewer than k wrong ones, so 1
    assert pass_at_k(np.array([1]), 4, 2) == 0.5
    assert pass_at_k(np.array([0, 1, 3]), 4, 2) == pytest.approx((0 + 0.5 + 1) / 3)


@given(counts)
def test_pass_at_k_is_the_mean_over_all_subsets(case):
    n, correct, k = case
    expected = [
        np.mean([any(i < c for i in subset) for subset in itertools.combinations(range(n), k)]) for c in correct
    ]
    assert pass_at_k(np.array(correct), n, k) == pytest.approx(np.mean(expected))


@given(counts)
def test_pass_at_1_is_the_average_and_k_only_helps(case):
    n, correct, k = case
    values = np.array(correct)
    assert pass_at_k(values, n, 1) == pytest.approx(values.mean() / n)
    assert pass_at_k(values, n, k) >= pass_at_k(values, n, max(k - 1, 1)) - 1e-12


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_names_the_key(k):
    with pytest.raises(ValueError, match=rf"evaluation\.k={k} .*evaluation\.samples=4"):
        pass_at_k(np.array([1]), 4, k)
    with pytest.raises(ValueError, match=rf"evaluation\.k={k} "):
        maj_at_k([["a"] * 4], np.ones((1, 4), bool), k)


def test_maj_at_k_by_hand():
    answers = [["a", "a", "b", "c"], ["a", "a", "b", "b"], ["a", "b", "c", "d"]]
    correct = np.array([[x == "a" for x in row] for row in answers])
    assert maj_at_k(answers, correct, 4) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    # blocks of two: aa|bc, aa|bb, ab|cd
    assert maj_at_k(answers, correct, 2) == pytest.approx((1 + 0 + 1 + 0 + 1 / 2 + 0) / 6)
    # blocks of three, the fourth sample unused: aab, aab, abc
    assert maj_at_k(answers, correct, 3) == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert maj_at_k(answers, correct, 1) == pytest.approx(correct.mean())


def test_distinct_correct_by_hand():
    answers = [["x", "y", "x", "z"], ["x", "x", "y", "y"]]
    correct = np.array([[True, True, True, False], [False, False, False, False]])
    assert distinct_correct(answers, correct) == 1.0


@given(counts, st.integers(0, 5))
def test_the_interval_holds_the_estimate_and_repeats(case, seed):
    n, correct, k = case
    values = np.array(correct)
    low, high = pass_interval(values, n, k, seed=seed, resamples=50)
    assert 0 <= low <= pass_at_k(values, n, k) <= high + 1e-12 <= 1 + 2e-12
    assert (low, high) == pass_interval(values, n, k, seed=seed, resamples=50)


def test_the_interval_has_the_binomial_width():
    # One sample of each of 400 questions, half right: sd of the mean is .025 over questions and again over samples, but
    # with n = 1 the second draw changes nothing, so the 95 % interval is .5 +- .049.
    low, high = pass_interval(np.arange(400) % 2, 1, 1, seed=0, resamples=4000)
    assert low == pytest.approx(0.451, abs=0.004)
    assert high == pytest.approx(0.549, abs=0.004)


def test_the_interval_counts_both_draws():
    # Every question alike, 2 of 4 right: only the samples vary, sd = sqrt(.25 / 4 / 100) = .025.
    low, high = pass_interval(np.full(100, 2), 4, 1, seed=0, resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * 0.025, rel=0.08)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (4, 4)])
def test_the_interval_is_honest_where_all_pass_or_none(n, k):
    """30 of 30 is not certainty: Wilson's 95 % interval is [0.886, 1], that of 0 of 30 [0, 0.114]."""
    assert pass_interval(np.full(30, n), n, k, seed=0) == (pytest.approx(0.8865, abs=1e-4), 1.0)
    assert pass_interval(np.zeros(30, int), n, k, seed=0) == (0.0, pytest.approx(0.1135, abs=1e-4))


def test_the_interval_of_single_answers_is_wilsons():
    assert pass_interval((np.arange(30) < 27).astype(int), 1, 1, seed=0) == pytest.approx((0.7438, 0.9654), abs=1e-4)
