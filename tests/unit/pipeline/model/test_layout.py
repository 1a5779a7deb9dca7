from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import layout
from pipeline.model.architecture import FAMILIES, Architecture, DeltaNet, Mla, Moe
from pipeline.model.grid import Grid
from pipeline.model.layout import Slice


def architecture(
    family="LlamaForCausalLM", heads=4, kv_heads=2, head_dim=2, ffn=8, vocab=7, layers=2, tied=False, **more
):
    own = FAMILIES[family]
    more = {"qkv_bias": own.qkv_bias is True, "qk_norm": own.qk_norm is True} | more
    return Architecture(own, layers, 6, ffn, heads, kv_heads, head_dim, vocab, 16, 1e-6, 1e4, None, tied, **more)


def row(model, name, grid=None):
    return {r.parameter: r for r in layout.rows(model, grid or Grid())}[name]


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
    untied = layout.rows(architecture(layers=4), Grid(pp=2))
    assert [r.stage for r in untied] == sorted(r.stage for r in untied)
    assert untied[0].parameter == "embedding.word_embeddings.weight"
    assert untied[-1].parameter == "output_layer.weight"
    assert row(architecture(layers=4), "decoder.layers.2.mlp.linear_fc2.weight", Grid(pp=2)).stage == 1
    tied = architecture(layers=4, tied=True)
    assert "output_layer.weight" not in {r.parameter for r in layout.rows(tied)}
    copy = row(tied, "output_layer.weight", Grid(pp=2))
    assert (copy.sources[0].name, copy.stage, copy.exported) == ("model.embed_tokens.weight", 1, False)
    assert layout.ignored("lm_head.weight", tied)
    assert not layout.ignored("lm_head.weight", architecture())


def test_fewer_key_value_groups_than_ranks_are_cut_anywhere():
    """As megatron-core: a rank's share of linear_qkv may end within a group, here 2 groups of 4 + 2 + 2 rows over 4
    ranks.
    """
    qkv = row(architecture(), "decoder.layers.0.self_attention.linear_qkv.weight")
    assert qkv.local_shape(4) == (4, 6)
    assert [qkv.slices(4, rank) for rank in range(4)] == [
        (Slice(0, 0, 0, 4),),
        (Slice(1, 0, 0, 2), Slice(2, 0, 2, 2)),
        (Slice(0, 4, 0, 4),),
        (Slice(1, 2, 0, 2), Slice(2, 2, 2, 2)),
    ]


def test_experts_lie_with_their_expert_parallel_rank():
    moe = Moe(layers=(False, True), experts=4, ffn=8, top_k=2)
    model = architecture("Qwen3MoeForCausalLM", moe=moe)
    grid = Grid(tp=2, dp=2, ep=2, etp=2)
    names = {r.parameter for r in layout.rows(model, grid)}
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names
    assert "decoder.layers.0.mlp.router.weight" not in names
    assert "decoder.layers.1.mlp.linear_fc1.weight" not in names
    third = row(model, "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight", grid)
    assert [s.name for s in third.sources] == [f"model.layers.1.mlp.experts.2.{n}_proj.weight" for n in ("gate", "up")]
    assert (third.layer, third.expert, third.ep, third.holders(grid)) == (1, 2, 1, (2, 3))
    assert [third.part(grid, rank) for rank in range(4)] == [None, None, (2, 0), (2, 1)]
    assert row(model, "decoder.layers.1.mlp.router.weight", grid).holders(grid) == (0, 1)
    with pytest.raises(ValueError, match="4 experts cannot be divided over ep=3"):
        layout.rows(model, Grid(dp=3, ep=3))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
        ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
        ("mlp.experts.linear_fc2.weight11", "mlp.experts.local_experts.11.linear_fc2.weight"),
        ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.local_experts.3.linear_fc1.weight"),
        ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
    ],
)
def test_transformer_engine_s_names(name, expected):
    assert layout.canonical(f"decoder.layers.2.{name}") == f"decoder.layers.2.{expected}"


SMALL = st.integers(1, 3)


@st.composite
def grids(draw, layers):
    """Grids that fit a model of ``layers`` layers and whatever ``models`` draws."""
    tp, dp, ep = (draw(st.sampled_from([1, 2, 4, 8])) for _ in range(3))
    etp = draw(st.sampled_from([size for size in (None, 1, 2, 4) if tp * dp % (ep * (size or tp)) == 0] or [0]))
    if etp == 0:
        ep, etp = 1, None
    pp = draw(st.sampled_from([size for size in (1, 2, 4) if layers % size == 0]))
    vpp = draw(st.sampled_from([size for size in (1, 2) if layers // pp % size == 0]))
    first = draw(st.integers(1, layers - 1)) if pp == 2 and vpp == 1 and draw(st.booleans()) else None
    return Grid(tp=tp, pp=pp, dp=dp, vpp=vpp, ep=ep, etp=etp, first_stage_layers=first)


@st.composite
def models(draw, families=tuple(FAMILIES)):
    """Models of every family, of sizes that any grid of ``grids`` divides.

    Some have fewer key-value groups than TP.
    """
    family = draw(st.sampled_from(families))
    kv_heads, layers = draw(st.sampled_from([1, 2, 4, 8])), 4 * draw(st.integers(1, 2))
    more = {}
    if family in ("Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"):
        experts = tuple(draw(st.lists(st.booleans(), min_size=layers, max_size=layers)))
        deepseek = family == "DeepseekV3ForCausalLM"
        shared = 8 * draw(st.integers(0, 2)) if deepseek else 0
        more["moe"] = Moe(experts, 8, 8 * draw(SMALL), 2, shared_ffn=shared, expert_bias=deepseek)
    if family in ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"):
        nets = tuple(draw(st.lists(st.booleans(), min_size=layers, max_size=layers)))
        more["delta"] = DeltaNet(nets, 8, 8 * draw(SMALL), *(draw(SMALL) for _ in range(3)))
    if family == "DeepseekV3ForCausalLM":
        more["mla"] = Mla(draw(st.integers(0, 3)), *(draw(SMALL) for _ in range(4)))
    return architecture(
        family,
        8 * draw(SMALL),
        kv_heads,
        4 * draw(SMALL),
        8 * draw(SMALL),
        draw(st.integers(4, 20)),
        layers,
        tied=draw(st.booleans()),
        **more,
    )


@settings(deadline=None)
@given(st.data())
def test_every_entry_of_every_tensor_is_held_exactly_once_per_replica(data):
    """Conservation: over the ranks of a replica the slices tile each source; within a rank they never overlap."""
    model = data.draw(models())
    grid = data.draw(grids(model.layers))
    held = defaultdict(Counter)
    for r in layout.rows(model, grid):
        count = len(r.holders(grid))
        for rank, (n, i) in ((k, r.part(grid, k)) for k in r.holders(grid)):
            assert (n, r.holders(grid)[i]) == (count, rank)
            local = Counter()
            for s in r.slices(n, i):
                local.update(range(s.start, s.start + s.length))
                if r.split is not None or i == 0:
                    held[r.parameter, r.sources[s.source].name].update(range(s.source_start, s.source_start + s.length))
            assert set(local.values()) <= {1}
            assert not local or max(local) < r.local_shape(n)[r.dim]
        parts = Counter(part for k in range(grid.world_size) if (part := r.part(grid, k)))
        replicas = grid.dp if r.expert is None else grid.expert_dp
        assert parts == {(count, i): replicas for i in range(count)}
        for source in r.sources:
            assert held[r.parameter, source.name] == Counter(range(source.shape[r.dim]))


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_tables_differ_where_the_families_do(family):
    model = architecture(family)
    names = {r.parameter for r in layout.rows(model)}
    prefix = "decoder.layers.0.self_attention."
    assert (prefix + "linear_qkv.bias" in names) == model.qkv_bias
    assert (prefix + "q_layernorm.weight" in names) == model.qk_norm


def test_an_unused_or_misspelt_condition_does_not_pass():
    """Every template's condition, sizes and place mean something."""
    model = architecture(
        "DeepseekV3ForCausalLM",
        moe=Moe((True, True), 2, 8, 1, shared_ffn=8, expert_bias=True),
        mla=Mla(2, 2, 2, 2, 2),
        delta=DeltaNet((True, False), 1, 1, 2, 2, 4),
    )
    assert {template.when for template in layout.TEMPLATES} == set(layout._CONDITIONS)
    for template in layout.TEMPLATES:
        assert template.place in ("first", "layer", "last")
        assert {size for shape in template.shapes for size in shape} <= set(model.sizes())
        assert len({shape[1 - (template.split or 0) :] for shape in template.shapes if len(shape) > 1}) <= 1
