"""Plans carried out by gloo processes give bit for bit what gathering and slicing whole tensors gives."""

import pytest
from execute_ranks import move

from pipeline.model.architecture import FAMILIES, Architecture, Moe
from pipeline.model.grid import Grid
from pipeline.reshard.engine_grid import EngineGrid, Placement


def model(
    family="Qwen3ForCausalLM", kv_heads=4, vocab=1000, moe=None, tied=False, hidden=24, ffn=64, heads=8, head_dim=4
):
    own = FAMILIES[family]
    has = {"qkv_bias": own.qkv_bias is True, "qk_norm": own.qk_norm is True}
    return Architecture(own, 4, hidden, ffn, heads, kv_heads, head_dim, vocab, 16, 1e-6, 1e4, None, tied, moe, **has)


EXPERTS = Moe((False, True, True, True), 4, 16, 2)
CASES = {
    "TP to TP": (model(), Grid(tp=4), EngineGrid(2, count=2), True),
    "PP, tied, biases": (model("Qwen2ForCausalLM", tied=True), Grid(tp=2, pp=2), EngineGrid(4), True),
    "VPP": (model(), Grid(tp=1, pp=2, dp=2, vpp=2), EngineGrid(1, count=3), True),
    "apart": (model(), Grid(tp=2), EngineGrid(2), False),
    "4 ranks, 1 key-value head for 4": (model(kv_heads=1), Grid(tp=1, pp=2, dp=2), EngineGrid(4), False),
    "DP, apart, two engines a node": (model(kv_heads=2), Grid(tp=2, dp=2), EngineGrid(2, count=2), False),
    "EP": (model("Qwen3MoeForCausalLM", moe=EXPERTS), Grid(tp=2, dp=2, ep=2, etp=1), EngineGrid(4, 2), True),
    "EP, PP, apart": (
        model("Qwen3MoeForCausalLM", moe=EXPERTS),
        Grid(tp=2, pp=2, ep=2, etp=1),
        EngineGrid(2, 2, count=2),
        False,
    ),
    "TP 8": (model(kv_heads=2), Grid(tp=2, pp=2, dp=2), EngineGrid(8), True),
}


@pytest.mark.parametrize("name", CASES)
def test_engine_shards_are_those_of_gather_then_slice(gang, name):
    architecture, learner, engines, colocated = CASES[name]
    for gpus_per_node in (2, 4):  # with buckets that cut the embedding and without
        placement = Placement.consecutive(learner.world_size, engines.world_size, colocated, gpus_per_node)
        case = (architecture, learner, engines, placement)
        bucket_bytes = {2: 10_000, 4: 1 << 20}[gpus_per_node]
        results = gang.run(move, placement.world_size, case, bucket_bytes, "bf16")
        for wrong, moved, minimum, sent, peak, buckets in results:
            assert wrong == []
            assert moved.received == minimum
            assert moved.sent == sent
            assert moved.peak_buffer == peak <= bucket_bytes
            assert (buckets > 1) == (gpus_per_node == 2)


@pytest.mark.parametrize("dtype", ["fp8", "fp32"])
def test_other_types(gang, dtype):
    architecture = model(hidden=160, ffn=512, head_dim=64, kv_heads=4, vocab=300)
    placement = Placement.consecutive(2, 2, False, 4)
    case = (architecture, Grid(tp=2), EngineGrid(2), placement)
    for wrong, moved, minimum, _, _, _ in gang.run(move, 4, case, 1 << 18, dtype):
        assert wrong == []
        assert moved.received == minimum
