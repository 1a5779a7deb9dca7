"""Rows of a ragged batch, picked and dealt to data-parallel ranks."""

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.types import PER_TARGET, PER_TOKEN, joined, positions, shares
from tests.grids import distinct, rows_of

SIZES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=12)  # prompt, response


def rows(whole):
    """All there is of each row."""
    counts = {name: whole.lengths for name in PER_TOKEN} | {name: whole.targets for name in PER_TARGET}
    each = torch.ones(whole.rows, dtype=torch.int64)
    return list(zip(*(rows_of(v, counts.get(n, each)) for n, v in whole.tensors().items()), strict=True))


@given(SIZES, st.data())
def test_taken_rows_are_those_rows(sizes, data):
    whole = distinct(sizes)
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=8))
    taken = whole.take(torch.tensor(chosen, dtype=torch.int64))
    assert rows(taken) == [rows(whole)[row] for row in chosen]
    assert taken.row_of_target.tolist() == [i for i, n in enumerate(taken.targets.tolist()) for _ in range(n)]
    assert {name: value.dtype for name, value in taken.tensors().items()} == {
        name: value.dtype for name, value in whole.tensors().items()
    }


def test_all_rows_in_turn_are_the_batch_itself():
    whole = distinct([(1, 2), (3, 1)])
    assert whole.take(torch.arange(2)) is whole
    assert rows(whole.take(torch.tensor([1, 0]))) == rows(whole)[::-1]
    assert whole.take(torch.arange(1)).rows == 1


@given(SIZES, st.integers(1, 3), st.data())
def test_shares_hold_every_row_once_and_know_its_place(sizes, ranks, data):
    whole = distinct(sizes)
    order = data.draw(st.permutations(range(len(sizes))))
    dealt = [[[list(order[rank::ranks][:2]), []], [list(order[rank::ranks][2:])]] for rank in range(ranks)]
    made = [pickle.loads(pickle.dumps(share)) for share in shares(whole, dealt)]
    back = torch.full((int(whole.targets.sum()),), torch.nan)
    for own, share in zip(dealt, made, strict=True):
        listed = [row for mini in own for micro in mini for row in micro]
        assert rows(share.batch) == [rows(whole)[row] for row in listed]
        assert share.micro_batches == [[len(micro) for micro in mini] for mini in own]
        back[positions(share.place)] = share.batch.behavior_log_probs
        assert share.total == len(back)
    assert torch.equal(back, whole.behavior_log_probs)
    assert torch.equal(
        joined((share.batch.behavior_log_probs for share in made), [share.place for share in made]), back
    )
