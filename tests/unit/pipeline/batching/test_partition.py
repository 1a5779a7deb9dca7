import itertools
import math
import random
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batching.partition import best_fit, partition

LOADS = st.lists(st.integers(0, 1000), max_size=60)


def sums(loads, parts):
    return [sum(loads[i] for i in part) for part in parts]


@settings(deadline=None)
@given(LOADS, st.integers(1, 9))
def test_every_item_once_and_sums_differ_by_no_more_than_the_largest(loads, count):
    parts = partition(loads, count)
    assert len(parts) == count
    assert sorted(itertools.chain(*parts)) == list(range(len(loads)))
    totals = sums(loads, parts)
    assert max(totals) - min(totals) <= max(loads, default=0)
    assert sum(map(bool, parts)) == min(count, len(loads))
    assert partition(loads, count) == parts


@settings(deadline=None)
@given(LOADS, st.integers(1, 9))
def test_equal_counts(loads, count):
    """Sums differ by no more than some ``count`` consecutive loads do, in order of size."""
    parts = partition(loads, count, equal_counts=True)
    assert sorted(itertools.chain(*parts)) == list(range(len(loads)))
    assert {len(part) for part in parts} <= {len(loads) // count, -(-len(loads) // count)}
    ordered = sorted(loads, reverse=True) + [0] * (-len(loads) % count)
    tuples = [ordered[i : i + count] for i in range(0, len(ordered), count)]
    totals = sums(loads, parts)
    assert max(totals) - min(totals) <= max((most[0] - most[-1] for most in tuples), default=0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 9), st.booleans())
def test_solutions_are_put_together_as_by_one_sort(loads, count, equal_counts):
    """The same lists as of the method written down plainly, equal sums included."""

    def plain(one, other, parts):
        both = max(0, len(one) + len(other) - parts)
        alone, rest = len(one) - both, len(other) - both
        pairs = zip(one[alone:], reversed(other[rest:]), strict=True)
        merged = one[:alone] + other[:rest] + [(x + y, items + more) for (x, items), (y, more) in pairs]
        return sorted(merged, key=lambda part: -part[0])

    found = partition(loads, count, equal_counts=equal_counts)
    with mock.patch("pipeline.batching.partition._merge", plain):
        assert partition(loads, count, equal_counts=equal_counts) == found


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_four_thirds_of_the_best_there_is(loads, count):
    def fullest(assignment):
        return max(sum(x for x, part in zip(loads, assignment, strict=True) if part == p) for p in range(count))

    best = min(fullest(a) for a in itertools.product(range(count), repeat=len(loads)))
    assert 3 * max(sums(loads, partition(loads, count))) <= 4 * best


def test_known_answers():
    """Karmarkar and Karp's example: differencing 8, 7, 6, 5, 4 leaves 2, where greedy leaves 4."""
    assert sorted(sums([8, 7, 6, 5, 4], partition([8, 7, 6, 5, 4], 2))) == [14, 16]
    assert partition([5], 3) == [[0], [], []]
    assert sorted(partition([4, 4, 4, 4], 4)) == [[0], [1], [2], [3]]


def test_responses_of_real_lengths():
    """128 log-normal lengths over 8 ranks: within 1 % of even (16 rows a rank)."""
    for seed in range(20):
        draw = random.Random(seed)
        lengths = [min(8192, 200 + int(draw.lognormvariate(7, 0.8))) for _ in range(128)]
        totals = sums(lengths, partition(lengths, 8))
        assert max(totals) <= 1.01 * sum(totals) / 8


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_best_fit(loads, capacity):
    parts = best_fit(loads, capacity)
    assert sorted(itertools.chain(*parts)) == list(range(len(loads)))
    totals = sorted(sums(loads, parts))
    assert all(total <= capacity for total in totals)
    assert len(totals) < 2 or sum(totals[:2]) > capacity
    assert len(parts) <= 2 * math.ceil(sum(loads) / capacity)


def test_best_fit_known_answers():
    """First fit would put the 2 with the 6; best fit leaves no room beside the 8."""
    assert best_fit([6, 8, 2], 10) == [[1, 2], [0]]
    assert best_fit([], 10) == []
