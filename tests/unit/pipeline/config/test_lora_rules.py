"""``learner.lora``: what it cannot be combined with is refused with key, value and remedy."""

import json

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
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
    "experts": (hf_config("qwen3_moe"), [ON], L + "targets", "experts"),
    "an expert's": (hf_config("qwen3_moe"), [ON, L + "targets=[q_proj, up_proj]"], L + "targets", "experts"),
    "latent": (hf_config("deepseek_v3"), [ON, L + "targets=[q_proj]"], L + "rank", "latent attention"),
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
}


def problems(folder, config, keys):
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    experts = ["rollout.engine=native"] if config.get("model_type") != "llama" else []
    try:
        load_config(None, [f"model.hf_path={folder}", *experts, *keys])
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("case", BROKEN)
def test_refused(tmp_path, case):
    config, keys, key, said = BROKEN[case]
    (problem,) = problems(tmp_path, config, keys)
    assert problem.key == key
    assert said in problem.render()
    assert problem.remedy


@pytest.mark.parametrize("case", FITTING)
def test_accepted(tmp_path, case):
    assert problems(tmp_path, *FITTING[case]) == ()
