from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.architecture import FAMILIES, Architecture
from megatron_ext.weights import hf, layout
from megatron_ext.weights.layout import Slice


def architecture(family="LlamaForCausalLM", heads=4, kv_heads=2, head_dim=2, ffn=8, vocab=7, layers=2, tied=False):
    return Architecture(FAMILIES[family], layers, 6, ffn, heads, kv_heads, head_dim, vocab, 16, 1e-6, 1e4, None, tied)


def row(model, name, pp=1):
    return {r.parameter: r for r in layout.rows(model, pp)}[name]


def test_query_key_value_rows_interleave_per_group():
    qkv = row(architecture(), "decoder.layers.1.self_attention.linear_qkv.weight")
    assert [s.name for s in qkv.sources] == [f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"]
    assert [s.shape for s in qkv.sources] == [(8, 6), (4, 6), (4, 6)]
    # Group g: 2 query heads of 2 rows, then one key and one value head.
    first = (Slice(0, 0, 0, 4), Slice(1, 0, 4, 2), Slice(2, 0, 6, 2))
    second = (Slice(0, 4, 8, 4), Slice(1, 2, 12, 2), Slice(2, 2, 14, 2))
    assert qkv.slices(1, 0) == first + second
    assert qkv.slices(2, 0) == first
    assert qkv.slices(2, 1) == tuple(Slice(s.source, s.source_start, s.start - 8, s.length) for s in second)
    assert qkv.local_shape(2) == (8, 6)


def test_gate_and_up_are_stacked_per_rank():
    fc1 = row(architecture(), "decoder.layers.0.mlp.linear_fc1.weight")
    assert fc1.slices(2, 1) == (Slice(0, 4, 0, 4), Slice(1, 4, 4, 4))


def test_vocabulary_is_padded_at_the_end():
    embedding = row(architecture(vocab=7), "embedding.word_embeddings.weight")
    assert embedding.local_shape(4) == (2, 6)
    assert [embedding.slices(4, rank) for rank in (2, 3)] == [(Slice(0, 4, 0, 2),), (Slice(0, 6, 0, 1),)]


def test_replicated_parameters_ignore_the_rank():
    norm = row(architecture(), "decoder.layers.0.input_layernorm.weight")
    assert norm.slices(2, 1) == (Slice(0, 0, 0, 6),)


def test_stages_and_tied_embeddings():
    untied = layout.rows(architecture(layers=4), 2)
    assert [r.stage for r in untied] == sorted(r.stage for r in untied)
    assert untied[0].parameter == "embedding.word_embeddings.weight"
    assert untied[-1].parameter == "output_layer.weight"
    assert row(architecture(layers=4), "decoder.layers.2.mlp.linear_fc2.weight", 2).stage == 1
    tied = architecture(layers=4, tied=True)
    assert "output_layer.weight" not in {r.parameter for r in layout.rows(tied, 1)}
    copy = row(tied, "output_layer.weight", 2)
    assert (copy.sources[0].name, copy.stage, copy.exported) == ("model.embed_tokens.weight", 1, False)
    assert layout.ignored("lm_head.weight", tied)
    assert not layout.ignored("lm_head.weight", architecture())


models = st.builds(
    lambda family, groups, share, head_dim, ffn, vocab, layers, tied: architecture(
        family, 4 * groups * share, 4 * groups, head_dim, 4 * ffn, vocab, 2 * layers, tied
    ),
    st.sampled_from(sorted(FAMILIES)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(4, 20),
    st.integers(1, 2),
    st.booleans(),
)


@given(models, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_every_entry_of_every_tensor_is_held_exactly_once(model, tp, pp):
    """Conservation: over TP ranks the slices tile each source, and within a rank they never overlap."""
    for r in layout.rows(model, pp):
        held = Counter()
        for rank in range(tp if r.split is not None else 1):
            local = Counter()
            for s in r.slices(tp, rank):
                local.update(range(s.start, s.start + s.length))
                held.update((s.source, s.source_start + i) for i in range(s.length))
            assert set(local.values()) <= {1}
            assert not local or max(local) < r.local_shape(tp)[r.dim]
        assert held == Counter((i, j) for i, source in enumerate(r.sources) for j in range(source.shape[r.dim]))


@given(models, st.sampled_from([1, 2]), st.integers(1, 2000))
def test_plan_holds_every_tensor_once_and_keeps_the_bound(model, pp, limit):
    rows = layout.rows(model, pp)
    buckets = hf.plan(rows, 4, limit / 2**20)
    names = [piece.name for bucket in buckets for piece in bucket]
    assert Counter(names) == Counter({s.name: 1 for r in rows for s in r.sources})
    for bucket in buckets:
        assert len({piece.row.stage for piece in bucket}) == 1
        assert len(bucket) == 1 or sum(4 * torch.Size(piece.shape).numel() for piece in bucket) <= limit


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tables_differ_where_the_families_do(family):
    model = architecture(family)
    names = {r.parameter for r in layout.rows(model)}
    prefix = "decoder.layers.0.self_attention."
    assert (prefix + "linear_qkv.bias" in names) == model.family.qkv_bias
    assert (prefix + "q_layernorm.weight" in names) == model.family.qk_norm
