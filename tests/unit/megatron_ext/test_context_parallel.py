"""Which part of a row a context-parallel rank computes. What all ranks make of it together: tests/distributed."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ext import context_parallel
from pipeline.objectives.loss import PolicyOutputs


def rank(index, size):
    return SimpleNamespace(cp_rank=index, cp_size=size)


def test_two_chunks_of_every_row_one_from_each_end():
    rows = torch.arange(16).view(2, 8)
    assert context_parallel.shard(rows, rank(0, 2)).tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert context_parallel.shard(rows, rank(1, 2)).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert [context_parallel.shard(rows, rank(i, 4))[0].tolist() for i in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_positions_are_those_of_the_parts(size):
    row = torch.arange(12 * size).view(1, -1)
    for index in range(size):
        own = context_parallel._positions(12, index, size, torch.device("cpu"))
        assert torch.equal(own, context_parallel.shard(row, rank(index, size))[0])


def test_a_rank_without_targets_computes_one():
    mask = torch.tensor([[False, False, True, True]])
    assert context_parallel.own_targets(mask, rank(0, 2)).tolist() == [[False, True]]
    assert context_parallel.own_targets(~mask, rank(0, 2)).tolist() == [[True, False]]
    early = torch.tensor([[True, False, False, True]])
    assert context_parallel.own_targets(early, rank(1, 2)).tolist() == [[True, False]]
    assert early.tolist() == [[True, False, False, True]]


def test_alone_nothing_is_cut():
    rows, mask = torch.arange(5)[None], torch.tensor([[True, False]])
    outputs = PolicyOutputs(torch.zeros(1), torch.ones(1))
    assert context_parallel.shard(rows, rank(0, 1)) is rows
    assert context_parallel.own_targets(mask, rank(0, 1)) is mask
    assert context_parallel.gather(outputs, mask, rank(0, 1)) is outputs
