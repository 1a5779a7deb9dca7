"""``learner.precision``: what combines with what, refused with key, value and remedy."""

import pytest

from tests.tiny_folder import hf_config

P = "learner.precision."
ON = [P + "fp8=hybrid", "model.dtype=bf16"]
EMULATED = [P + "fp8=e4m3", P + "emulate=true"]
SHARDED = [*ON, P + "fp8_param=true", "learner.optimizer.distributed=true"]
BROKEN = {
    "recipe alone": ([P + "fp8_recipe=delayed"], P + "fp8_recipe", "no effect while learner.precision.fp8=none"),
    "emulate alone": ([P + "emulate=true"], P + "emulate", "no effect while"),
    "local": ([*ON, "learner.transformer_impl=local"], "learner.transformer_impl", "have no FP8"),
    "float32": ([P + "fp8=hybrid"], "model.dtype", "bf16 models"),
    "emulated engine": (
        [*EMULATED, "learner.transformer_impl=transformer_engine"],
        "learner.transformer_impl",
        "megatron-core's own layers",
    ),
    "emulated parameters": ([*EMULATED, P + "fp8_param=true"], P + "fp8_param", "keeps parameters"),
    "emulated attention": (
        [*EMULATED, P + "fp8_dot_product_attention=true"],
        P + "fp8_dot_product_attention",
        "leaves attention",
    ),
    "emulated delayed recompute": (
        [*EMULATED, P + "fp8_recipe=delayed", "learner.recompute_granularity=full"],
        "learner.recompute_granularity",
        "twice",
    ),
    "margin": ([*ON, P + "fp8_margin=1"], P + "fp8_margin", "no effect with learner.precision.fp8_recipe=blockwise"),
    "history": ([*ON, P + "fp8_amax_history_len=16"], P + "fp8_amax_history_len", "no effect with"),
    "delayed, first and last": (
        [*ON, P + "fp8_recipe=delayed", P + "first_last_layers_bf16=true"],
        P + "first_last_layers_bf16",
        "all layers or none",
    ),
    "count alone": ([*ON, P + "num_layers_at_end_in_bf16=2"], P + "num_layers_at_end_in_bf16", "no effect without"),
    "too many layers": (
        [*EMULATED, P + "first_last_layers_bf16=true", P + "num_layers_at_start_in_bf16=7"],
        P + "num_layers_at_start_in_bf16",
        "a pipeline stage has 6 layers",
    ),
    "blockwise attention": (
        [*ON, P + "fp8_dot_product_attention=true"],
        P + "fp8_dot_product_attention",
        "no FP8 attention with fp8_recipe=blockwise",
    ),
    "parameters, whole optimizer": ([*ON, P + "fp8_param=true"], P + "fp8_param", "distributed optimizer"),
    "parameters, mxfp8": ([*SHARDED, P + "fp8_recipe=mxfp8"], P + "fp8_param", "not built"),
    "parameters, reference": ([*SHARDED, "objective.kl_coef=0.1"], P + "fp8_param", "objective.kl_coef=0.1"),
    "mistyped": ([P + "fp8=fp8"], P + "fp8", "not one of"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_rule(refused, rule):
    refused(*BROKEN[rule], intermediate_size=192)


@pytest.mark.parametrize(
    "overrides",
    [
        ON,
        SHARDED,
        EMULATED,
        [*EMULATED, P + "fp8_recipe=delayed", P + "fp8_margin=1", P + "fp8_amax_history_len=4"],
        [*EMULATED, "learner.recompute_granularity=full"],
        [*ON, P + "first_last_layers_bf16=true", P + "num_layers_at_end_in_bf16=6"],
        [*ON, P + "fp8_recipe=tensorwise", P + "fp8_dot_product_attention=true"],
        [*ON, P + "fp8_recipe=mxfp8"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_what_the_rules_let_pass(problems, overrides):
    assert problems(*overrides, intermediate_size=192) == ()


def test_dimensions_that_fp8_products_take(problems):
    (found,) = problems(*ON, intermediate_size=184)
    assert (found.key, found.value) == (P + "fp8_recipe", "blockwise")
    assert found.problem.endswith("multiples of 16, but a rank holds mlp.linear_fc2.weight [64, 184]")
    assert problems(*ON, intermediate_size=176) == ()
    (found,) = problems(*ON, P + "fp8_recipe=mxfp8", intermediate_size=176)
    assert found.problem.endswith("multiples of 32, but a rank holds mlp.linear_fc2.weight [64, 176]")
    assert problems(*EMULATED, intermediate_size=184) == ()
    tp4 = [*ON, "learner.tensor_model_parallel_size=4"]
    assert problems(*tp4, intermediate_size=192) == ()
    (found,) = problems(*tp4, P + "fp8_recipe=mxfp8", intermediate_size=192)
    assert found.problem.endswith("self_attention.linear_proj.weight [64, 16], mlp.linear_fc2.weight [64, 48]")


def test_experts_and_latent_attention_have_dimensions_too(problems):
    fits = hf_config("deepseek_v3", q_lora_rank=32, qk_rope_head_dim=16)
    short = [*ON, "rollout.max_prompt_tokens=16", "rollout.max_new_tokens=16"]
    assert problems(*short, **fits) == ()
    (found,) = problems(*short, **fits | {"moe_intermediate_size": 24, "q_lora_rank": 24})
    assert "linear_q_up_proj.weight [128, 24], " in found.problem
    assert "mlp.shared_experts.linear_fc2.weight [64, 24], mlp.experts.linear_fc2.weight [64, 24]" in found.problem
