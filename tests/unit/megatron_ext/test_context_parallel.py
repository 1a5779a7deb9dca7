"""Which part of a row a context-parallel rank computes. What all ranks make of it together: tests/distributed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext import context_parallel
from megatron_ext.context_parallel import columns
from pipeline.objectives.loss import PolicyOutputs


def test_two_chunks_of_every_row_one_from_each_end():
    rows = torch.arange(16).view(2, 8)
    assert context_parallel.shard(rows, columns([8], 0, 2)).tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert context_parallel.shard(rows, columns([8], 1, 2)).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert [columns([8], rank, 4).tolist() for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_packed_rows_are_cut_one_by_one():
    """Rows of 4, 8 and 4; what Transformer Engine's kernel says of them."""
    assert columns([4, 8, 4], 0, 2).tolist() == [0, 3, 4, 5, 10, 11, 12, 15]
    assert columns([4, 8, 4], 1, 2).tolist() == [1, 2, 6, 7, 8, 9, 13, 14]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(2, 5))
def test_ranks_share_all_columns_as_transformer_engine_deals_them(chunks, size):
    """By the arithmetic of its kernel, ``thd_partition_src_index`` in ``fused_attn/context_parallel.cu`` (2.20)."""
    lengths = [2 * size * chunk for chunk in chunks]
    parts = [columns(lengths, rank, size).tolist() for rank in range(size)]
    for rank, part in enumerate(parts):
        expected, start = [], 0
        for half in chunks:  # of a rank's part of a row
            theirs = [rank if place < half else 2 * (size - 1) - rank for place in range(2 * half)]
            expected += [place + start * size + half * offset for place, offset in enumerate(theirs)]
            start += 2 * half
        assert part == expected
    assert sorted(place for part in parts for place in part) == list(range(sum(lengths)))


def test_a_rank_without_targets_computes_one():
    mask = torch.tensor([[False, False, True, True]])
    first, second = columns([4], 0, 2), columns([4], 1, 2)
    assert context_parallel.own_targets(mask, first).tolist() == [[False, True]]
    assert context_parallel.own_targets(~mask, first).tolist() == [[True, False]]
    early = torch.tensor([[True, False, False, True]])
    assert context_parallel.own_targets(early, second).tolist() == [[True, False]]
    assert early.tolist() == [[True, False, False, True]]


def test_alone_nothing_is_cut():
    rows, mask = torch.arange(5)[None], torch.tensor([[True, False]])
    outputs = PolicyOutputs(torch.zeros(1), torch.ones(1))
    assert columns([5], 0, 1) is None
    assert context_parallel.shard(rows, None) is rows
    assert context_parallel.own_targets(mask, None) is mask
    assert context_parallel.gather(outputs, mask, None, None) is outputs
