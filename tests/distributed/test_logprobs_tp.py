"""Log-probs and entropy with the vocabulary split over two processes."""

import logprobs_ranks
import pytest
import torch


@pytest.mark.parametrize("chunk", [4096, 5])
@pytest.mark.parametrize("vocab_size", [37, 40, 20])  # some padding, none, a second rank of nothing but padding
def test_split_vocabulary_equals_whole(gang, vocab_size, chunk):
    logits, targets, weights = logprobs_ranks.whole(vocab_size)
    values, grad = logprobs_ranks.differentiate(logits, targets, weights, vocab_size, None)
    first, second = gang.run(logprobs_ranks.run, 2, vocab_size, chunk)
    assert (first[0] == second[0]).all()  # bit for bit the same on both ranks
    torch.testing.assert_close(torch.from_numpy(first[0]), values, rtol=1e-5, atol=1e-5)
    split = torch.cat([torch.from_numpy(first[1]), torch.from_numpy(second[1])], 1)
    torch.testing.assert_close(split, grad, rtol=0, atol=1e-5)
    assert torch.isfinite(grad).all()
    for _, _, calls in (first, second):
        assert calls == ["RedOpType.MAX", "RedOpType.SUM"]


def test_a_group_of_one_takes_no_collective(gang):
    ((values, _, calls),) = gang.run(logprobs_ranks.run, 1, 37, 4096)
    logits, targets, weights = logprobs_ranks.whole(37)
    assert calls == []
    assert (values == logprobs_ranks.differentiate(logits, targets, weights, 37, None)[0].numpy()).all()
