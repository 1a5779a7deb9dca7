import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext import batching
from pipeline.types import TrainBatch


def batch(rows, auxiliary=0, **changes):
    fields = {
        "tokens": torch.arange(rows * 4).view(rows, 4),
        "lengths": torch.full((rows,), 4),
        "loss_mask": torch.ones(rows, 3, dtype=torch.bool),
        "weights": torch.ones(rows),
        "advantages": torch.ones(rows),
        "auxiliary": torch.arange(rows) >= rows - auxiliary,
        "correct": torch.ones(rows, dtype=torch.bool),
        "temperatures": torch.ones(rows),
        "behavior_log_probs": torch.zeros(rows, 3),
    }
    return TrainBatch(**(fields | changes))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_rows_are_dealt_out_once_in_equal_shapes(rows, size, dp):
    ranks = [batching.micro_batches(rows, size, rank, dp) for rank in range(dp)]
    shapes = {tuple(len(micro) for micro in micros) for micros in ranks}
    assert len(shapes) == 1  # every rank: as many micro-batches
    (lengths,) = shapes
    assert len(set(lengths)) == 1  # all as long
    assert lengths[0] <= size
    flat = torch.cat([torch.cat(micros) for micros in ranks])
    assert sorted(flat[flat >= 0].tolist()) == list(range(rows))
    assert (flat < 0).sum() < dp * (len(lengths) + 1)


def test_data_parallel_ranks_interleave():
    assert [i.tolist() for i in batching.micro_batches(5, 2, 1, 2)] == [[1, 3], [-1, -1]]


def test_dummies_carry_nothing():
    whole = batch(3, positive_weights=torch.ones(3))
    taken = batching.take(whole, torch.tensor([2, batching.PADDING]))
    assert taken.tokens[0].tolist() == [8, 9, 10, 11]
    assert taken.weights.tolist() == [1, 0]
    assert taken.positive_weights.tolist() == [1, 0]
    assert taken.auxiliary.tolist() == [False, True]
    assert taken.correct.tolist() == [True, False]
    assert taken.loss_mask.tolist() == [[True] * 3, [True, False, False]]
    assert whole.weights.tolist() == [1, 1, 1]


def test_auxiliary_rows_are_spread_over_mini_batches():
    minis = batching.mini_batches(batch(9, auxiliary=4, old_log_probs=torch.zeros(9, 3)), 2)
    assert [mini.tokens[:, 0].tolist() for mini in minis] == [[0, 8, 16, 20, 28], [4, 12, 24, 32]]
    assert [int(mini.auxiliary.sum()) for mini in minis] == [2, 2]


def test_one_mini_batch_is_the_batch():
    whole = batch(3)
    assert batching.mini_batches(whole, 1) == [whole]


def test_mini_batches_need_rows_and_old_log_probs():
    with pytest.raises(ValueError, match=r"updates_per_step=4 needs at least as many main rows; the batch has 2"):
        batching.mini_batches(batch(5, auxiliary=3, old_log_probs=torch.zeros(5, 3)), 4)
    with pytest.raises(ValueError, match="old_log_probs"):
        batching.mini_batches(batch(4), 2)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
def test_micro_batches_in_groups(rows, size, dp, multiple):
    """What the interleaved pipeline schedule asks: a multiple of the stages, each row still once."""
    ranks = [batching.micro_batches(rows, size, rank, dp, multiple) for rank in range(dp)]
    assert {len(micros) % multiple for micros in ranks} == {0}
    dealt = torch.cat([torch.cat(micros) for micros in ranks])
    assert sorted(dealt[dealt != batching.PADDING].tolist()) == list(range(rows))


def test_padding_of_columns():
    padded = batching.pad(batch(2, old_log_probs=torch.ones(2, 3)), 4)
    assert padded.tokens.shape == (2, 5)
    assert padded.loss_mask.tolist() == [[True, True, True, False]] * 2
    assert padded.old_log_probs.tolist() == [[1, 1, 1, 0]] * 2
    assert padded.weights.shape == (2,)
    same = batch(2)
    assert batching.pad(same, 3) is same
