import pytest

from pipeline.model.architecture import FAMILIES, Architecture, Moe
from pipeline.model.layout import rows
from pipeline.reshard.engine_grid import EngineGrid, Placement


def model(family="Qwen3ForCausalLM", heads=8, kv_heads=2, vocab=1000, moe=None, ffn=16):
    own = FAMILIES[family]
    has = {"qkv_bias": own.qkv_bias is True, "qk_norm": own.qk_norm is True}
    return Architecture(own, 1, 6, ffn, heads, kv_heads, 4, vocab, 16, 1e-6, 1e4, None, False, moe, **has)


def spans(grid, architecture, name):
    for row in rows(architecture):
        for index, source in enumerate(row.sources):
            if source.name.endswith(name):
                experts = architecture.moe.experts if architecture.moe else 0
                return [grid.interval(row, index, experts, rank) for rank in range(grid.tp)]
    raise KeyError(name)


def test_vocabulary_is_padded_to_64_then_divided():
    # 1000 -> 1024 = 4 x 256: the last rank holds 232 rows and 24 of padding.
    assert spans(EngineGrid(4), model(), "embed_tokens.weight") == [
        range(0, 256),
        range(256, 512),
        range(512, 768),
        range(768, 1000),
    ]
    # 65 -> 128 = 8 x 16: five ranks hold rows, three only padding.
    lengths = [len(span) for span in spans(EngineGrid(8), model(vocab=65), "lm_head.weight")]
    assert lengths == [16, 16, 16, 16, 1, 0, 0, 0]


def test_key_value_heads_are_held_by_several_ranks_where_these_are_more():
    assert spans(EngineGrid(8), model(), "k_proj.weight") == [range(0, 4)] * 4 + [range(4, 8)] * 4
    assert spans(EngineGrid(8), model(), "q_proj.weight")[3] == range(12, 16)
    assert spans(EngineGrid(2), model(kv_heads=4), "v_proj.weight") == [range(0, 8), range(8, 16)]


def test_projections_are_divided_and_norms_are_not():
    assert spans(EngineGrid(2), model(), "down_proj.weight") == [range(0, 8), range(8, 16)]
    assert spans(EngineGrid(2), model(), "o_proj.weight") == [range(0, 16), range(16, 32)]
    assert spans(EngineGrid(2), model(), "input_layernorm.weight") == [range(0, 6)] * 2


def test_experts_lie_on_groups_of_neighbours_that_divide_each():
    moe = model("Qwen3MoeForCausalLM", moe=Moe((True,), 4, 8, 2))
    grid = EngineGrid(4, 2)
    none = range(0)
    assert spans(grid, moe, "experts.1.gate_proj.weight") == [range(0, 4), range(4, 8), none, none]
    assert spans(grid, moe, "experts.2.down_proj.weight") == [none, none, range(0, 4), range(4, 8)]
    assert spans(grid, moe, "mlp.gate.weight") == [range(0, 4)] * 4


@pytest.mark.parametrize(
    ("grid", "architecture", "message"),
    [
        (EngineGrid(3), model(), "tp=3 does not divide num_attention_heads=8"),
        (EngineGrid(4, 3), model(), "ep=3 does not divide tp=4"),
        (EngineGrid(8), model(ffn=12), "tp=8 does not divide intermediate_size=12"),
        (EngineGrid(4), model(heads=24, kv_heads=6), "neither a divisor nor a multiple of num_key_value_heads=6"),
        (EngineGrid(2, 2), model(), "ep=2: the model has no experts"),
        (EngineGrid(4, 4), model("Qwen3MoeForCausalLM", moe=Moe((True,), 6, 8, 2)), "ep=4 does not divide the number"),
    ],
)
def test_what_sglang_refuses_is_refused(grid, architecture, message):
    with pytest.raises(ValueError, match=message):
        grid.check(architecture)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="count=0"):
        EngineGrid(count=0)


def test_placement():
    assert Placement.consecutive(4, 2, True, 2).nodes == (0, 0, 1, 1)
    apart = Placement.consecutive(4, 2, False, 4)
    assert (apart.nodes, apart.engine_process(1)) == ((0, 0, 0, 0, 1, 1), 5)
    with pytest.raises(ValueError, match="lower the number of engines"):
        Placement.consecutive(2, 4, True)
    with pytest.raises(ValueError, match="names 1 processes, there are 2"):
        Placement(2, 2, True, (0,))
