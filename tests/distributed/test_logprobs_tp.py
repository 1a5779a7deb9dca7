"""Log-probs and entropy with the vocabulary split over two processes."""

import logprobs_ranks
import numpy as np
import pytest
import torch


def close(mine, other, tolerance=1e-5):
    torch.testing.assert_close(torch.from_numpy(mine), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("vocab_size", [37, 40, 20])  # some padding, none, a second rank of nothing but padding
def test_split_vocabulary_equals_whole(gang, vocab_size):
    values, grad = logprobs_ranks.from_logits(logprobs_ranks.whole(vocab_size), vocab_size, None)
    first, second = gang.run(logprobs_ranks.run, 2, vocab_size)
    assert (first[0] == second[0]).all()  # bit for bit the same on both ranks
    close(first[0], values)
    close(np.concatenate([first[1], second[1]], 1), grad)
    assert torch.isfinite(grad).all()
    for _, _, calls in (first, second):
        assert calls == ["MAX [12]", "SUM [6, 12]"]


@pytest.mark.parametrize("tile", [None, (5, 7)])
@pytest.mark.parametrize("vocab_size", [37, 20])
def test_split_projection_equals_whole(gang, vocab_size, tile):
    """Two collectives forward, one backward, however many blocks."""
    inputs = (*logprobs_ranks.factors(), *logprobs_ranks.whole(vocab_size)[1:])
    values, hidden, weight = logprobs_ranks.from_hidden(inputs, vocab_size, None)
    first, second = gang.run(logprobs_ranks.run_linear, 2, vocab_size, tile)
    assert (first[0] == second[0]).all()
    close(first[0], values)
    close(first[1], hidden, 2e-5)
    assert (first[1] == second[1]).all()
    close(np.concatenate([first[2], second[2]]), weight, 2e-5)
    for *_, calls in (first, second):
        assert calls == ["MAX [12]", "SUM [6, 12]", "SUM [12, 6]"]


def test_a_group_of_one_takes_no_collective(gang):
    ((values, _, calls),) = gang.run(logprobs_ranks.run, 1, 37)
    assert calls == []
    assert (values == logprobs_ranks.from_logits(logprobs_ranks.whole(37), 37, None)[0].numpy()).all()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kernel", ["fused", "torch"])
def test_head_selects_before_it_projects(gang, kernel, sequence_parallel):
    """Only chosen positions have a gradient, the same whether the sequence is divided or not; the layer is itself
    again.
    """
    ((values, states, weight, _, _),) = gang.run(logprobs_ranks.run_head, 1, "torch", False)
    assert values.shape == (3, 5)
    assert ((states != 0).any(-1).sum(), states.shape) == (5, (4, 3, 6))
    results = gang.run(logprobs_ranks.run_head, 2, kernel, sequence_parallel)
    for mine, _, _, calls, restored in results:
        close(mine, torch.from_numpy(values))
        assert calls == ["MAX [5]", "SUM [4, 5]"] + ([] if sequence_parallel else ["SUM [5, 6]"])
        assert restored
    got = np.concatenate([r[1] for r in results]) if sequence_parallel else results[0][1]
    close(got, torch.from_numpy(states), 2e-5)
    close(np.concatenate([r[2] for r in results]), torch.from_numpy(weight), 2e-5)
