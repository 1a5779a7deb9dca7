"""``learner.lora``: what it cannot be combined with is refused with key, value and remedy."""

import pytest

from tests.tiny_folder import LLAMA, hf_config

L = "learner.lora."
ON = L + "rank=8"
BROKEN = {
    "alpha alone": (LLAMA, [L + "alpha=16"], L + "alpha", "no effect"),
    "no targets": (LLAMA, [ON, L + "targets=[]"], L + "targets", "no layer"),
    "twice": (LLAMA, [ON, L + "targets=[all-linear, q_proj]"], L + "targets", "already"),
    "one of them twice": (LLAMA, [ON, L + "targets=[q_proj, v_proj, q_proj]"], L + "targets", "give [q_proj, v_proj]"),
    "in another order": (LLAMA, [ON, L + "targets=[v_proj, q_proj]"], L + "targets", "give [q_proj, v_proj]"),
    "unknown": (LLAMA, [ON, L + "targets=[lm_head]"], L + "targets", "lm_head"),
    "FP8": (
        LLAMA,
        [ON, "learner.precision.fp8=e4m3", "learner.precision.emulate=true"],
        "learner.precision.fp8",
        "FP8",
    ),
    "half of an expert's": (hf_config("qwen3_moe"), [ON, L + "targets=[q_proj, up_proj]"], L + "targets", "as one"),
    "half of Mixtral's": (hf_config("mixtral"), [ON, L + "targets=[w3, w2]"], L + "targets", "w1 and w3"),
    "Mixtral has other names": (hf_config("mixtral"), [ON, L + "targets=[down_proj]"], L + "targets", "w1, w3, w2]"),
    "stacked experts": (hf_config("gpt_oss"), [ON, L + "targets=[q_proj, down_proj]"], L + "targets", "down_proj"),
    "latent": (hf_config("deepseek_v3"), [ON, L + "targets=[q_proj]"], L + "targets", "give names of [q_a_proj, q_b"),
    "no delta net": (LLAMA, [ON, L + "targets=[q_proj, out_proj]"], L + "targets", "linear layer out_proj"),
    "rank": (LLAMA, [L + "rank=65"], L + "rank", "hidden size of 64"),
    "router": (
        hf_config("glm4_moe"),
        [ON, L + "targets=[q_proj]", "learner.moe_router_bias_update_rate=0.001"],
        "learner.moe_router_bias_update_rate",
        "biases",
    ),
}
FITTING = {
    "off": (LLAMA, []),
    "all": (LLAMA, [L + "rank=64"]),
    "some": (LLAMA, [ON, L + "targets=[q_proj, down_proj]", L + "alpha=16"]),
    "attention beside experts": (hf_config("qwen3_moe"), [ON, L + "targets=[q_proj, o_proj]"]),
    **{f"all of {name}": (hf_config(name), [ON]) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_5_text")},
}


def served(config):
    """What a model of this ``config.json`` needs beside the keys of adapters."""
    return ["rollout.engine=native"] if config["model_type"] != "llama" else []


@pytest.mark.parametrize("case", BROKEN)
def test_refused(problems, case):
    config, keys, key, said = BROKEN[case]
    (problem,) = problems(*served(config), *keys, **config | {"max_position_embeddings": 4096})
    assert problem.key == key
    assert said in problem.render()
    assert problem.remedy


@pytest.mark.parametrize("case", FITTING)
def test_accepted(problems, case):
    config, keys = FITTING[case]
    assert problems(*served(config), *keys, **config | {"max_position_embeddings": 4096}) == ()
