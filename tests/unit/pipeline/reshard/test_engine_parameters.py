"""Where what the plan brings lies in SGLang's parameters: every entry is written once, but the padded vocabulary's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import architecture
from pipeline.model.fp8_layout import BLOCK, scale_name, scale_shape
from pipeline.model.grid import Grid
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.engine_parameters import Target, targets
from pipeline.reshard.plan import make_plan
from tests.tiny_folder import hf_config
from tests.unit.pipeline.reshard.test_plan import cases


def arrivals(plan, process):
    """Shape of what arrives of every tensor that has a place, FP8 codes and scales of what arrived whole included."""
    for index, span in plan.needs(process).items():
        tensor = plan.tensors[index]
        shape = tuple(tensor.part_shape(len(span)))
        yield tensor.name, shape
        if tensor.quantise == "after":
            yield scale_name(tensor.name), scale_shape(shape)


def written(plan, process):
    """How often each entry of each parameter is written, a parameter being as large as the places in it ask for."""
    boxes = {}
    places = targets(plan, process)
    for name, shape in arrivals(plan, process):
        to = places[name]
        area = [slice(0, size) for size in shape]
        area[to.dim] = slice(to.start, to.start + shape[to.dim])
        boxes.setdefault(to.parameter, []).append((*(slice(at, at + 1) for at in to.index), *area))
    counts = {}
    for parameter, areas in boxes.items():
        counts[parameter] = np.zeros([max(area[dim].stop for area in areas) for dim in range(len(areas[0]))], int)
        for area in areas:
            counts[parameter][area] += 1
    return counts


@settings(deadline=None, max_examples=60)
@given(cases())
def test_every_entry_of_every_parameter_is_written_exactly_once(case):
    plan = make_plan(*case)
    for rank in range(plan.engines.world_size):
        for parameter, counts in written(plan, plan.placement.engine_process(rank)).items():
            assert (counts == 1).all(), parameter


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from(["qwen3", "qwen3_moe", "deepseek_v3"]))
def test_codes_and_scales_lie_alike(engine_tp, learner_tp, family):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    sizes |= {"q_lora_rank": 128, "kv_lora_rank": 64} if family == "deepseek_v3" else {}
    heads |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64} if family == "deepseek_v3" else {}
    model = architecture.parse(hf_config(family, **sizes, **heads))
    placement = Placement.consecutive(learner_tp, engine_tp, False)
    plan = make_plan(model, Grid(tp=learner_tp), EngineGrid(engine_tp), placement, dtype="fp8")
    assert ("after" in {tensor.quantise for tensor in plan.tensors}) == (learner_tp == 4)
    for rank in range(engine_tp):
        counts = written(plan, plan.placement.engine_process(rank))
        assert all((count == 1).all() for count in counts.values())
        for parameter, count in counts.items():
            if parameter.endswith("weight_scale_inv"):
                codes = counts[parameter.removesuffix("_scale_inv")].shape
                assert count.shape[-2:] == tuple(
                    -(-size // width) for size, width in zip(codes[-2:], BLOCK, strict=True)
                )


def test_places_of_one_rank():
    """Rank 3 of 4, two of which share each of two key-value heads; experts 2 and 3 of 4, halved."""
    model = architecture.parse(hf_config("qwen3_moe", mlp_only_layers=[0]))
    plan = make_plan(model, Grid(), EngineGrid(4, 2), Placement.consecutive(1, 4, False))
    found = targets(plan, 4)
    layer = "model.layers.{}."
    dense, sparse = layer.format(0), layer.format(1)
    assert found[dense + "self_attn.v_proj.weight"] == Target(dense + "self_attn.qkv_proj.weight", (), 0, 16 + 16)
    assert found[dense + "self_attn.o_proj.weight"] == Target(dense + "self_attn.o_proj.weight", (), 1, 0)
    assert found[dense + "mlp.up_proj.weight"] == Target(dense + "mlp.gate_up_proj.weight", (), 0, 24)
    assert found[sparse + "mlp.experts.3.up_proj.weight"] == Target(sparse + "mlp.experts.w13_weight", (1,), 0, 16)
    assert found[sparse + "mlp.experts.2.down_proj.weight"] == Target(sparse + "mlp.experts.w2_weight", (0,), 1, 0)
    assert found[sparse + "mlp.gate.weight"] == Target(sparse + "mlp.gate.weight", (), 0, 0)
    assert sparse + "mlp.experts.1.up_proj.weight" not in found
    # Of 48 rows, padded to 64, the last of four ranks has none.
    assert "lm_head.weight" not in found
    assert targets(plan, 3)["lm_head.weight"] == Target("lm_head.weight", (), 0, 0)


def test_the_routers_correction_bias_stays_float32():
    plan = make_plan(
        architecture.parse(hf_config("deepseek_v3")), Grid(), EngineGrid(), Placement.consecutive(1, 1, True)
    )
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert {tensor.item_size for tensor in plan.tensors if tensor.name == bias} == {4}
    assert {tensor.item_size for tensor in plan.tensors if tensor.name != bias} == {2}
    assert targets(plan, 0)[bias] == Target(bias, (), 0, 0)


@pytest.mark.parametrize("compressed", [True, False])
def test_latent_attention_with_and_without_query_compression(compressed):
    config = hf_config("deepseek_v3", q_lora_rank=24 if compressed else None)
    plan = make_plan(architecture.parse(config), Grid(), EngineGrid(2), Placement.consecutive(1, 2, False))
    prefix = "model.layers.0.self_attn."
    found = targets(plan, 2)[prefix + "kv_a_proj_with_mqa.weight"]
    fused = Target(prefix + "fused_qkv_a_proj_with_mqa.weight", (), 0, 24)
    assert found == (fused if compressed else Target(prefix + "kv_a_proj_with_mqa.weight", (), 0, 0))
