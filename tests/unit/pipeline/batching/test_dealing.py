import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batching import dealing
from tests.calls import counted
from tests.grids import distinct, ragged

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@st.composite
def cuts(draw):
    return dealing.Cut(
        max_rows=draw(st.sampled_from([0, 1, 3, 50])),
        max_tokens=draw(st.sampled_from([0, 100, 130, 1000])),
        packed=draw(st.booleans()),
        align=(align := draw(st.sampled_from([1, 8]))),
        row_align=draw(st.sampled_from([1, align // 2 or 1])),
        multiple_of=draw(st.integers(1, 3)),
    )


def positions(lengths, rows, cut):
    """Tokens computed for these rows, said in another way."""
    if not rows:
        return 0
    widths = [lengths[row] for row in rows]
    if cut.packed:
        widths = [math.ceil(width / cut.row_align) * cut.row_align for width in widths]
    return (
        math.ceil((sum(widths) if cut.packed else max(widths)) / cut.align)
        * cut.align
        * (1 if cut.packed else len(rows))
    )


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), cuts())
def test_micro_batches_keep_their_promises(lengths, ranks, cut):
    if cut.packed:
        cut = replace(cut, max_rows=0)  # never both: the learner's budget for packed rows is in tokens
    dealt = dealing.micro_batches(lengths, ranks, cut)
    assert sorted(row for own in dealt for rows in own for row in rows) == list(range(len(lengths)))
    (each,) = {len(own) for own in dealt}  # as many on every rank
    assert each % cut.multiple_of == 0
    found = [[positions(lengths, rows, cut) for rows in own] for own in dealt]
    if cut.max_tokens:
        assert max(map(max, found)) <= math.ceil(cut.max_tokens / cut.align) * cut.align
    if cut.max_rows:
        assert max(len(rows) for own in dealt for rows in own) <= cut.max_rows
    assert all(own == sorted(own, reverse=True) for own in found)
    assert dealing.micro_batches(lengths, ranks, cut) == dealt
    if not cut.packed and len(lengths) >= ranks * each:
        assert all(rows for own in dealt for rows in own)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), cuts())
def test_work_is_balanced_over_ranks(lengths, ranks, cut):
    """The busiest rank has at most (1 - 1/ranks) of the largest row (of the largest grid) more than the mean."""
    cut = replace(cut, max_rows=0 if cut.packed else cut.max_rows)
    dealt = dealing.micro_batches(lengths, ranks, cut)
    if cut.packed:
        padded = [math.ceil(length / cut.row_align) * cut.row_align for length in lengths]
        work, largest = [sum(padded[row] for rows in own for row in rows) for own in dealt], max(padded)
    else:
        grids = [[positions(lengths, rows, cut) for rows in own] for own in dealt]
        work, largest = list(map(sum, grids)), max(map(max, grids))
    assert ranks * max(work) <= sum(work) + (ranks - 1) * largest


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 3))
def test_no_more_micro_batches_than_needed(lengths, ranks):
    """Packed within twice the fewest there can be; grids of sorted rows with the fewest."""
    fewest = math.ceil(math.ceil(sum(lengths) / 100) / ranks)
    packed = dealing.micro_batches(lengths, ranks, dealing.Cut(max_tokens=100, packed=True))
    assert len(packed[0]) <= max(2 * fewest, fewest + sum(length > 50 for length in lengths))
    grids, left = 0, sorted(lengths)
    while left:
        grids, left = grids + 1, left[: -(100 // left[-1])]
    assert len(dealing.micro_batches(lengths, ranks, dealing.Cut(max_tokens=100))[0]) == math.ceil(grids / ranks)


def test_rows_of_a_grid_are_alike_in_length():
    """Runs 10 | 9 | 3 3 2 | 2 of 10, 9, 9 and 2 positions, the largest and the smallest to one rank; then 10 9 | 3 3 2
    2.
    """
    lengths = [2, 9, 3, 2, 10, 3]
    assert dealing.micro_batches(lengths, 2, dealing.Cut(max_tokens=12)) == [[[0, 2, 5], [1]], [[4], [3]]]
    assert dealing.micro_batches(lengths, 1, dealing.Cut(max_tokens=20)) == [[[1, 4], [0, 2, 3, 5]]]


def test_packed_rows_fill_the_budget():
    """36 tokens in three times 12: 2 + 10, 2 + 10, 9 + 3."""
    cut = dealing.Cut(max_tokens=12, packed=True)
    assert dealing.micro_batches([2, 9, 3, 2, 10, 10], 1, cut) == [[[3, 4], [0, 5], [1, 2]]]


def test_fewer_rows_than_ranks_leave_empty_micro_batches():
    assert dealing.micro_batches([5], 2, dealing.Cut(max_rows=4)) == [[[0]], [[]]]


def test_a_row_beyond_the_budget_is_refused():
    with pytest.raises(
        ValueError, match=r"max_tokens_per_micro_batch=9 cannot hold a row of 10 tokens: raise it to rollo"
    ):
        dealing.micro_batches([3, 10], 1, dealing.Cut(max_tokens=9))


@pytest.mark.parametrize(("packed", "even"), [(False, 1.02), (True, 1.0001)])
def test_a_step_of_real_lengths_is_balanced(packed, even):
    """1024 log-normal rows over 8 ranks; grids waste less than 5 % on padding."""
    draw = random.Random(0)
    lengths = [min(8192, 200 + int(draw.lognormvariate(7, 0.8))) for _ in range(1024)]
    cut = dealing.Cut(max_tokens=16384, packed=packed)
    work = [sum(positions(lengths, rows, cut) for rows in own) for own in dealing.micro_batches(lengths, 8, cut)]
    assert max(work) <= even * sum(work) / 8
    assert sum(work) <= 1.05 * sum(lengths)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_a_step_of_16384_rows_is_cut_at_once(ranks):
    """Mean 5,000 tokens, largest 31,700: 70 calls a row, where dealing anew until it fits took minutes.

    Fewest within 2 %.
    """
    draw = random.Random(0)
    lengths = [min(31700, 200 + int(draw.lognormvariate(8.15, 0.8))) for _ in range(16384)]
    dealt, calls = counted(dealing.micro_batches, lengths, ranks, dealing.Cut(max_tokens=32768, packed=True))
    assert 16384 < calls < 100 * 16384
    work = [sum(lengths[row] for rows in own for row in rows) for own in dealt]
    assert max(work) <= 1.05 * sum(work) / ranks
    assert len(dealt[0]) <= math.ceil(1.02 * math.ceil(sum(lengths) / 32768) / ranks)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 300), st.sampled_from([0, 1, 3, 50]))
def test_runs_begin_where_one_row_after_the_other_would_begin_them(lengths, parts, cap, max_rows):
    widths = sorted(lengths, reverse=True)
    starts = [0]
    for row in range(1, len(widths)):
        rows = row - starts[-1] + 1
        full = rows * widths[starts[-1]] > cap or 0 < max_rows < rows
        if full or len(widths) - row <= parts - len(starts):
            starts.append(row)
    assert dealing._starts(widths, parts, cap, max_rows) == starts


def test_a_dealer_hands_out_the_shares_it_is_asked_for():
    """The mini-batches of an update, or one; a rank's share is the same whoever else is asked for."""
    batch = distinct([(1, 2), (1, 1), (2, 2), (1, 1)])
    dealer = dealing.Dealer(dealing.Cut(max_rows=1), ranks=2, updates=2)
    both = list(dealer.shares(batch, range(2), for_update=True))
    (second,) = dealer.shares(batch, [1], for_update=True)
    assert sorted(torch.cat([share.batch.weights for share in both]).tolist()) == [0, 1, 2, 3]
    assert second.batch.weights.tolist() == both[1].batch.weights.tolist()
    assert [len(share.micro_batches) for share in both] == [2, 2]
    (measured,) = dealer.shares(batch, [0], for_update=False)
    assert len(measured.micro_batches) == 1


def test_a_step_is_cut_once(monkeypatch):
    """The log-probs and the update of one step ask for the same cut; another batch or layout is cut anew."""
    cuts, whole = [], dealing._pack
    monkeypatch.setattr(dealing, "_pack", lambda *asked: cuts.append(asked) or whole(*asked))
    cut = dealing.Cut(max_tokens=77, packed=True)
    first = dealing.micro_batches([7, 9, 77], 2, cut)
    first[0][0].clear()  # the caller's own
    assert dealing.micro_batches([7, 9, 77], 2, cut) == [[[2]], [[0, 1]]]
    assert len(cuts) == 1
    dealing.micro_batches([7, 9, 77], 1, cut)
    assert len(cuts) == 2


def test_a_dummy_carries_nothing_and_has_what_its_batch_has():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    grid, row = torch.ones(mask.shape), torch.ones(2)
    fields = {name: row for name in ("weights", "advantages", "temperatures", "positive_weights")}
    flags = {"auxiliary": row > 2, "correct": row > 0}
    tokens = torch.arange(8).view(2, 4)
    whole = ragged(tokens, torch.tensor([4, 2]), mask, **fields, **flags, behavior_log_probs=grid, token_weights=grid)
    dummy = dealing.dummy(whole)
    assert dummy.tensors().keys() == whole.tensors().keys()
    assert all(dummy.tensors()[name].dtype == value.dtype for name, value in whole.tensors().items())
    assert (dummy.lengths.tolist(), dummy.targets.tolist(), dummy.loss_mask.tolist()) == ([2], [1], [False, True])
    assert (dummy.weights.tolist(), dummy.positive_weights.tolist()) == ([0], [0])
    assert (dummy.auxiliary.tolist(), dummy.correct.tolist()) == ([True], [False])
    assert dummy.row_of_target.tolist() == [0]


def auxiliary(rows, count):
    return torch.arange(rows) >= rows - count


def test_auxiliary_rows_are_spread_over_mini_batches():
    minis = dealing.mini_batches(auxiliary(9, 4), 2)
    assert [mini.tolist() for mini in minis] == [[0, 2, 4, 5, 7], [1, 3, 6, 8]]


def test_one_mini_batch_is_the_batch():
    assert [mini.tolist() for mini in dealing.mini_batches(auxiliary(3, 1), 1)] == [[0, 1, 2]]


def test_mini_batches_need_rows():
    with pytest.raises(ValueError, match=r"updates_per_step=4 needs at least as many main rows; the batch has 2"):
        dealing.mini_batches(auxiliary(5, 3), 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(2, 101), st.booleans()), min_size=4, max_size=30), st.integers(1, 4), cuts())
def test_every_row_is_dealt_once_and_no_micro_batch_mixes_mini_batches(rows, ranks, cut):
    lengths, extra = torch.tensor([length for length, _ in rows]), torch.tensor([more for _, more in rows])
    extra[:3] = False
    dealt = dealing.deal(lengths, extra, ranks, cut, 3)
    minis = dealing.mini_batches(extra, 3)
    for number, mini in enumerate(minis):
        own = [rank[number] for rank in dealt]
        assert sorted(row for micros in own for micro in micros for row in micro) == sorted(mini.tolist())
        assert own == [
            [[int(mini[i]) for i in micro] for micro in micros]
            for micros in dealing.micro_batches((lengths[mini] - 1).tolist(), ranks, cut)
        ]
