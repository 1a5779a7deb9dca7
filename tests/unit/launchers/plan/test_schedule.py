"""Pipeline schedules: what waits for its backward pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.plan.schedule import bubble, under_way


@given(st.integers(1, 8), st.integers(1, 40), st.data())
def test_one_forward_one_backward_holds_a_micro_batch_per_stage_that_follows(pp, micro_batches, data):
    stage = data.draw(st.integers(0, pp - 1))
    counts = [counts for _, (counts,) in under_way(stage, pp, 1, micro_batches)]
    assert len(counts) == micro_batches
    assert max(counts) == min(pp - stage, micro_batches)
    assert counts[-1] == 1


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 5), st.data())
def test_interleaved_chunks_each_pass_forward_then_backward(pp, vpp, rounds, data):
    stage, micro_batches = data.draw(st.integers(0, pp - 1)), rounds * pp
    events = list(under_way(stage, pp, vpp, micro_batches))
    assert all(counts[chunk] >= 1 and max(counts) <= micro_batches for chunk, counts in events)
    for chunk in range(vpp):
        assert sum(which == chunk for which, _ in events) == micro_batches
    assert sum(events[-1][1]) == 1  # only the last backward pass is left
    peak = max(sum(counts) for _, counts in events)
    assert peak == min(micro_batches * vpp, 2 * (pp - stage - 1) + (vpp - 1) * pp + 1)


def test_interleaving_by_hand():
    # PP 2, VPP 2, stage 0, 2 micro-batches: forward 0a 1a 0b 1b, then all backward passes, the last chunk's first.
    assert list(under_way(0, 2, 2, 2)) == [(1, (2, 2)), (1, (2, 1)), (0, (2, 0)), (0, (1, 0))]
    # Stage 1 has one fewer under way when it begins: 0a 1a 0b, backward 0b, forward 1b, ...
    assert list(under_way(1, 2, 2, 2)) == [(1, (2, 1)), (1, (2, 1)), (0, (2, 0)), (0, (1, 0))]


def test_bubbles_by_hand():
    assert bubble(1, 1, 8) == 0
    assert bubble(4, 1, 9) == pytest.approx(3 / 12)
    assert bubble(4, 3, 9) == pytest.approx(1 / 10)
