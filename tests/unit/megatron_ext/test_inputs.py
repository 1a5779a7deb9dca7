"""The two forms of a micro-batch, by hand: a padded grid and a packed sequence."""

from dataclasses import replace

import torch
from megatron.core.transformer import TransformerConfig

from megatron_ext import inputs
from tests.grids import mask_of, ragged, tokens_of

T, F = True, False


def micro():
    """Rows of 3, 5 and 2 tokens: 2, 4 and 1 input tokens."""
    rows = torch.zeros(3)
    return ragged(
        tokens=torch.tensor([[11, 12, 13, 0, 0], [21, 22, 23, 24, 25], [31, 32, 0, 0, 0]]),
        lengths=torch.tensor([3, 5, 2]),
        loss_mask=torch.tensor([[F, T, F, F], [F, F, T, T], [T, F, F, F]]),
        weights=rows,
        advantages=rows,
        auxiliary=rows.bool(),
        correct=rows.bool(),
        temperatures=rows,
        behavior_log_probs=torch.zeros(3, 4),
    )


def test_grid():
    got = inputs.build(micro(), packing=False)
    assert got.tokens.tolist() == [[11, 12, 0, 0], [21, 22, 23, 24], [31, 0, 0, 0]]
    assert torch.equal(got.targets, mask_of(micro()))
    assert (got.real, got.packed) == (7, None)
    assert got.filled.tolist() == [[T, T, F, F], [T, T, T, T], [T, F, F, F]]
    wide = inputs.build(micro(), packing=False, align=3)
    assert wide.tokens.shape == wide.targets.shape == (3, 6)
    assert not wide.targets[:, 4:].any()


def test_packed():
    got = inputs.build(micro(), packing=True)
    assert got.tokens.tolist() == [[11, 12, 21, 22, 23, 24, 31]]
    assert got.targets.tolist() == [[F, T, F, F, T, T, T]]
    assert got.real == 7
    assert got.packed.cu_seqlens_q.tolist() == got.packed.cu_seqlens_kv.tolist() == [0, 2, 6, 7]
    assert got.packed.cu_seqlens_q.dtype == torch.int32
    assert (got.packed.max_seqlen_q, got.packed.qkv_format) == (4, "thd")


def test_packed_padding_is_a_row_of_its_own():
    got = inputs.build(micro(), packing=True, align=16)
    assert got.tokens.shape == got.targets.shape == (1, 16)
    assert not got.targets[0, 7:].any()
    assert got.packed.cu_seqlens_q.tolist() == [0, 2, 6, 7, 16]
    assert (got.real, got.packed.max_seqlen_q) == (7, 9)
    assert got.filled.tolist() == [[T] * 7 + [F] * 9]


def test_packed_rows_that_ranks_share_are_padded_one_by_one():
    """To chunks of 2 ranks; what is left of the alignment is a row of its own."""
    got = inputs.build(micro(), packing=True, align=16, cp=(1, 2))
    assert got.tokens.tolist() == [[11, 12, 0, 0, 21, 22, 23, 24, 31] + 7 * [0]]
    assert got.filled.tolist() == [[T, T, F, F, T, T, T, T, T] + 7 * [F]]
    assert (got.tokens[got.targets] + 1).tolist() == [13, 24, 25, 32]
    ends = got.packed.cu_seqlens_q
    assert ends.tolist() == [0, 4, 8, 12, 16]
    assert ends is got.packed.cu_seqlens_q_padded is got.packed.cu_seqlens_kv_padded
    assert got.own.tolist() == [1, 2, 5, 6, 9, 10, 13, 14]
    grid = inputs.build(micro(), packing=False, align=4, cp=(0, 2))
    assert (grid.tokens.shape, grid.own.tolist()) == ((3, 4), [0, 3])
    assert inputs.build(micro(), packing=False).own is None


def test_routes_lie_where_the_tokens_that_they_are_of_lie():
    """Two layers of two experts; 0 on padding."""
    rows = micro()
    of_token = torch.arange(100, 110, dtype=torch.int32).to(torch.uint16)
    routed = replace(rows, routes=of_token[:, None, None].expand(10, 2, 2))
    grid, packed = (inputs.build(routed, packing=packing, align=4).routes for packing in (False, True))
    assert (grid == grid[..., :1, :1]).all()
    assert grid[..., 1, 1].tolist() == [[100, 101, 0, 0], [103, 104, 105, 106], [108, 0, 0, 0]]
    assert packed[..., 0, 1].tolist() == [[100, 101, 103, 104, 105, 106, 108, 0]]
    assert inputs.build(rows, packing=True).routes is None


def test_targets_are_in_the_batch_s_order():
    """What the output layer is given, row-major, is what the loss takes from the batch, row-major."""
    rows = micro()
    following = tokens_of(rows)[:, 1:][mask_of(rows)]
    for packing in (False, True):
        got = inputs.build(rows, packing=packing, align=4)
        assert (got.tokens[got.targets] + 1).tolist() == following.tolist()


def test_alignment():
    """Cut over CP in two pieces per rank, over TP by sequence parallelism, and FP8's blocks."""

    def of(**config):
        made = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=4)
        for name, value in config.items():  # not in the constructor, which asks for Transformer Engine
            setattr(made, name, value)
        return inputs.alignment(made)

    assert of() == 1
    assert of(tensor_model_parallel_size=4) == 1
    assert of(tensor_model_parallel_size=4, sequence_parallel=True) == 4
    assert of(context_parallel_size=2) == 4
    assert of(context_parallel_size=2, tensor_model_parallel_size=3, sequence_parallel=True) == 12
    assert of(fp8="e4m3", tensor_model_parallel_size=4, sequence_parallel=True) == 32
