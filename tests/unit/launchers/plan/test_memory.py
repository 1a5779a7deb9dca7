"""The memory estimate by hand, and what each key does to it. Counted bytes: tests/distributed/test_estimate.py."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.plan import activations, memory
from launchers.plan.work import from_config
from pipeline.config.load import PACKAGED, load_config
from pipeline.config.schema import LoraConfig
from pipeline.model import architecture
from pipeline.model.grid import grid_of

GIB = 2**30
TP = "learner.tensor_model_parallel_size"
PP = "learner.pipeline_model_parallel_size"
DP = "learner.data_parallel_size"
ROWS = ("learner.micro_batch_size=1", "rollout.max_prompt_tokens=1", "rollout.max_new_tokens=4096")
# Entries of Qwen3-32B: 64 layers of attention (q 8192, kv 1024, hidden 5120), feed-forward (25600), norms; vocabulary
# 151936 twice.
LAYER = 5120 * (8192 + 2 * 1024) + 8192 * 5120 + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128
QWEN3_32B = 64 * LAYER + 2 * 151936 * 5120 + 5120


def total(work):
    return max(stage.total for stage in memory.stages(work))


def parts(work, stage=0):
    return memory.stages(work)[stage].parts


def test_what_stays_is_two_four_and_twelve_bytes_per_parameter(plan):
    held = parts(plan("qwen3-32b", *ROWS))
    assert held["parameters"] == 2 * QWEN3_32B
    assert held["gradients"] == 4 * QWEN3_32B
    assert held["optimizer"] == 12 * QWEN3_32B
    assert held["reference"] == held["fp8_weights"] == 0


def test_adapters_alone_have_gradients_and_an_optimizer(plan):
    """Rank 32, of query, key, value and output, gate, up and down; B has every row of a fused matrix."""
    held = parts(plan("qwen3-32b", *ROWS, "learner.lora.rank=32", "objective.kl_coef=0.1"))
    attention = 3 * 5120 + (8192 + 2 * 1024) + 8192 + 5120
    adapters = 64 * 32 * (attention + 2 * 5120 + 2 * 25600 + 25600 + 5120)
    assert held["parameters"] == 2 * (QWEN3_32B + adapters)
    assert held["gradients"] == 4 * adapters
    assert held["optimizer"] == 12 * adapters
    assert held["reference"] == 0  # the model without its adapters


def test_qwen3_32b_with_adapters_fits_where_all_of_it_does_not():
    keys = ["model.hf_path=model/qwen3-32b"]
    config = load_config(Path("recipe/qwen3-32b_lora.yaml"), keys)
    work = from_config(architecture.read(PACKAGED / "model" / "qwen3-32b"), config)
    all_weights = replace(work, learner=replace(work.learner, lora=LoraConfig()))
    assert config.learner.world_size + config.rollout.engines * config.rollout.tensor_parallel_size == 8
    assert total(work) < 60 * GIB
    assert total(all_weights) > 160 * GIB


def test_stages_together_hold_the_model_once(plan):
    stages = memory.stages(plan("qwen3-32b", *ROWS, f"{PP}=4"))
    assert sum(stage.parts["parameters"] for stage in stages) == 2 * QWEN3_32B
    assert [stage.layers for stage in stages] == [16] * 4
    assert [stage.under_way for stage in stages] == [4, 3, 2, 1]


def test_the_distributed_optimizer_divides_adam_s_state_alone(plan):
    alone, shared = (
        parts(plan("qwen3-32b", *ROWS, f"{DP}=4", f"learner.optimizer.distributed={on}")) for on in ("false", "true")
    )
    assert shared["optimizer"] == pytest.approx(alone["optimizer"] / 4, rel=1e-6)
    assert shared["gradients"] == pytest.approx(alone["gradients"], rel=1e-6)


@pytest.mark.parametrize(("mib", "handed"), [(1024, 2 * GIB), (1 << 16, 2 * QWEN3_32B)])
def test_a_weight_sync_hands_engines_on_the_same_gpu_two_buckets_at_most(plan, mib, handed):
    apart, shared = (
        memory.stages(plan("qwen3-32b", *ROWS, f"learner.bucket_mib={mib}", f"rollout.placement={placement}"))[0].sync
        for placement in ("disaggregated", "colocated")
    )
    assert shared - apart == handed


def test_experts_are_divided_over_their_own_replicas(plan):
    layout = (f"{TP}=4", f"{DP}=4", "learner.expert_tensor_parallel_size=1", "learner.optimizer.distributed=true")
    held = [parts(plan("qwen3-30b-a3b", *ROWS, *layout, f"learner.expert_model_parallel_size={ep}")) for ep in (8, 16)]
    experts = 48 * 128 * 3 * 2048 * 768
    # 16 ranks of a stage: EP 8 leaves 2 replicas of each expert, EP 16 one. Both keep 1/16 of Adam's state for experts.
    assert held[0]["parameters"] - held[1]["parameters"] == pytest.approx(2 * experts / 16, rel=1e-6)
    assert held[0]["optimizer"] == pytest.approx(held[1]["optimizer"], rel=1e-6)


def test_a_reference_policy_is_one_more_copy_of_the_parameters(plan):
    held = parts(plan("qwen3-32b", *ROWS, "objective.kl_coef=0.1"))
    assert held["reference"] == held["parameters"]


@pytest.mark.parametrize(("param", "parameters", "copies"), [("false", 2, 2), ("true", 1, 1)])
def test_fp8_keeps_two_copies_of_the_matrices_or_the_parameters_themselves(plan, param, parameters, copies):
    keys = ("learner.precision.fp8=hybrid", "learner.precision.fp8_recipe=tensorwise")
    held = parts(plan("qwen3-32b", *ROWS, *keys, f"learner.precision.fp8_param={param}"))
    matrices = 64 * (LAYER - 2 * 5120 - 2 * 128)
    assert held["fp8_weights"] == copies * matrices
    assert held["parameters"] == parameters * matrices + 2 * (QWEN3_32B - matrices)


def test_fp8_leaves_the_first_and_last_layers_in_bf16(plan):
    keys = ("learner.precision.fp8=hybrid", "learner.precision.fp8_recipe=tensorwise")
    all_layers = parts(plan("qwen3-32b", *ROWS, *keys))["fp8_weights"]
    inner = parts(plan("qwen3-32b", *ROWS, *keys, "learner.precision.first_last_layers_bf16=true"))["fp8_weights"]
    assert inner == pytest.approx(all_layers * 62 / 64)


def test_emulation_stores_what_bf16_does(plan):
    keys = ("learner.precision.fp8=hybrid", "learner.precision.emulate=true")
    assert parts(plan("qwen3-32b", *ROWS, *keys)) == parts(plan("qwen3-32b", *ROWS))


def test_a_layer_of_transformer_engine_by_hand(plan):
    work = plan("qwen3-32b", *ROWS, f"{TP}=4", "learner.sequence_parallel=true")
    tokens, hidden, q, kv, ffn = 4096, 5120, 8192 // 4, 1024 // 4, 25600 // 4
    norms = 2 * (2 * 2 * hidden + 4) / 4  # input and output, bf16, and the inverse deviation, divided by SP
    attention = 2 * (q + 2 * kv) + 2 * q + 2 * (q + kv) + 2 * q  # projection, the norm's copy, rotated, output
    statistics = 4 * (16 + 2) + 4 * 16  # of the norms of queries and keys, and of the softmax, per head
    gated = 2 * 3 * ffn
    expected = tokens * (norms + attention + statistics + gated)
    assert activations.layer(work, 0).saved == pytest.approx(expected, rel=1e-12)


def test_full_recomputation_keeps_one_input_per_group(plan):
    full = ("learner.recompute_granularity=full", "learner.recompute_num_layers=4")
    work = plan("qwen3-32b", *ROWS, *full)
    one_input = 4096 * 5120 * 2
    instants = activations.backward(work, range(16))
    assert instants[0].kept == 4 * one_input
    assert instants[1].recomputed == pytest.approx(4 * activations.layer(work, 0).saved - one_input)


@pytest.mark.parametrize("model", ["qwen3-32b", "llama-3.1-8b"])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_every_remedy_lowers_the_activations(plan, model, impl):
    base = (*ROWS, f"{TP}=2", "rollout.prompts_per_step=8", f"learner.transformer_impl={impl}")
    size = total(plan(model, *base))
    for keys in (
        ("learner.sequence_parallel=true",),
        ("learner.context_parallel_size=2",),
        ("learner.recompute_granularity=full",),
        ("learner.recompute_granularity=full", "learner.recompute_method=block", "learner.recompute_num_layers=8"),
        ("learner.recompute_granularity=selective",),
    ):
        changed = total(plan(model, *base, *keys))
        assert changed < size if impl == "local" or "selective" not in keys[0] else changed <= size, keys


def test_fused_keeps_no_logits(plan):
    keys = (*ROWS, f"{TP}=4", "learner.recompute_granularity=full")
    sizes = {
        kernel: sum(memory.logits(plan("qwen3-32b", *keys, f"learner.log_prob_kernel={kernel}")))
        for kernel in ("torch", "triton", "fused", "auto")
    }
    buffer = 4096 * 151936 / 4 * 2
    assert sizes["triton"] > buffer
    assert sizes["torch"] > sizes["triton"]
    assert sizes["fused"] == sizes["auto"] < sizes["triton"]


def test_rows_are_padded_to_what_the_layout_divides(plan):
    keys = ("rollout.max_prompt_tokens=10", "rollout.max_new_tokens=20", "learner.context_parallel_size=2")
    assert plan("qwen3-32b", *keys).length == 32  # 29 tokens, a multiple of 2 x CP
    assert plan("qwen3-32b", *keys, f"{TP}=8", "learner.sequence_parallel=true").length == 32
    assert plan("qwen3-32b", *keys[:2]).length == 29


def test_micro_batches_by_rows_and_by_tokens(plan):
    keys = ("rollout.prompts_per_step=4", "rollout.samples_per_prompt=8", "rollout.max_prompt_tokens=100")
    keys += ("rollout.max_new_tokens=925", f"{DP}=2")
    by_rows = plan("qwen3-32b", *keys, "learner.micro_batch_size=3")
    assert (by_rows.rows, by_rows.micro_batches, by_rows.targets) == (3, 6, 3 * 925)  # 16 rows per replica
    by_tokens = plan("qwen3-32b", *keys, "learner.max_tokens_per_micro_batch=4096")
    assert (by_tokens.rows, by_tokens.micro_batches, by_tokens.targets) == (4, 4, 4096)
    expected = plan("qwen3-32b", *keys, "learner.max_tokens_per_micro_batch=4096", mean_response=413)
    assert expected.micro_batches == 2  # 16 rows of 512 tokens
    assert expected.computed == (8, 512)


def test_auxiliary_rows_count(plan):
    keys = ("rollout.prompts_per_step=4", "rollout.samples_per_prompt=8", "entropy.actuator=resample")
    assert plan("qwen3-32b", *keys).step_rows == 32 + 4 * 16
    assert plan("qwen3-32b", *keys, "entropy.pi.split_range=true").step_rows == 32 + 4 * 16
    assert plan("qwen3-32b", *keys, "entropy.controller=none").step_rows == 32


@settings(max_examples=15, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 4, 8]),
    vpp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 2]),
    rows=st.integers(1, 64),
)
def test_stages_share_the_model_and_nothing_is_negative(plan, tp, pp, vpp, dp, rows):
    keys = (f"{TP}={tp}", f"{PP}={pp}", f"{DP}={dp}", f"learner.micro_batch_size={rows}")
    work = plan("qwen3-32b", *keys, f"learner.virtual_pipeline_model_parallel_size={vpp if pp > 1 else 1}")
    assert grid_of(work.learner) == work.grid
    stages = memory.stages(work)
    assert all(size >= 0 for stage in stages for size in stage.parts.values())
    assert all(set(stage.parts) == set(memory.PARTS) for stage in stages)
    held = sum(stage.parts["parameters"] for stage in stages) * tp
    norms = 64 * (2 * 5120 + 2 * 128) + 5120  # whole on every TP rank
    assert held == 2 * (QWEN3_32B + (tp - 1) * norms)
