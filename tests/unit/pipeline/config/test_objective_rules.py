"""Losses, advantages and token shapings: what does not go together, refused with key, value and remedy."""

import json

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from tests.tiny_folder import LLAMA

O = "objective."
TWO = "learner.updates_per_step=2"
GSPO = [TWO, O + "loss=gspo", O + "aggregation=sequence_mean"]
BROKEN = {
    "gspo on-policy": (GSPO[1:], O + "loss", "every ratio is exactly 1"),
    "cispo on-policy": ([O + "loss=cispo"], O + "loss", "every ratio is exactly 1"),
    "ce_gppo on-policy": ([O + "loss=ce_gppo"], O + "loss", "every ratio is exactly 1"),
    "kl_cov on-policy": ([O + "loss=kl_cov"], O + "loss", "every ratio is exactly 1"),
    "kl_cov dual clip": ([TWO, O + "loss=kl_cov", O + "dual_clip=10"], O + "dual_clip", "bounds of its own"),
    "gspo token mean": (GSPO[:2], O + "aggregation", "mean of sequences"),
    "gspo clip_cov": ([*GSPO, O + "token_shaping=[clip_cov]"], O + "token_shaping", "clips whole sequences"),
    "opefo off-policy": ([TWO, O + "token_shaping=[opefo]"], "learner.updates_per_step", "strictly on-policy"),
    "opefo first": ([O + "token_shaping=[opefo,stare]"], O + "token_shaping", "upsets the balance"),
    "twice": ([O + "token_shaping=[stare,stare]"], O + "token_shaping", "stare is named twice"),
    "two Clip-Covs": (
        [O + "token_shaping=[clip_cov]", "entropy.actuator=clip_cov"],
        "entropy.actuator",
        "detaches tokens by covariance",
    ),
    "clip_cov limits": ([O + "token_shaping=[clip_cov]", O + "clip_cov.low=5"], O + "clip_cov.low", "not below"),
    "idle kl_cov": ([O + "kl_cov.coef=2"], O + "kl_cov.coef", "no effect without objective.loss=kl_cov"),
    "idle pass_at_k": ([O + "pass_at_k.share=1"], O + "pass_at_k.share", "without objective.advantage=pass_at_k"),
    "idle stare": ([O + "stare.target=1"], O + "stare.target", "no effect without objective.token_shaping=[stare]"),
    "pass@k of all": (
        [O + "advantage=pass_at_k", O + "pass_at_k.samples=16"],
        O + "pass_at_k.samples",
        "needs fewer than all",
    ),
    "rlrt budget": (
        [O + "token_shaping=[rlrt]", "learner.max_tokens_per_micro_batch=2048"],
        "learner.max_tokens_per_micro_batch",
        "up to 4096 tokens",
    ),
    "overlong": ([O + "overlong.buffer=1025"], O + "overlong.buffer", "longer than a response"),
    "idle penalty": ([O + "overlong.penalty=2"], O + "overlong.penalty", "no effect while"),
    "replaces": (["entropy.auxiliary_replaces=true"], "entropy.auxiliary_replaces", "draws no auxiliary rows"),
}
ALLOWED = [
    GSPO,
    [*GSPO, O + "token_shaping=[entrocraft]"],
    [TWO, O + "loss=kl_cov", O + "kl_cov.fraction=2e-4", O + "advantage=rloo"],
    [O + "loss=htpo", O + "dual_clip=10", O + "token_shaping=[entropy_adv,stare,opefo]"],
    [O + "token_shaping=[clip_cov]", "entropy.actuator=entropy_bonus"],
    [O + "token_shaping=[rlrt]", "learner.max_tokens_per_micro_batch=4096"],
    [O + "advantage=pass_at_k", O + "pass_at_k.samples=15"],
    ["entropy.actuator=resample", "entropy.auxiliary_replaces=true", "entropy.positive_mean=main"],
]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_nonsense_is_refused(model, name):
    overrides, key, words = BROKEN[name]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"model.hf_path={model}", *overrides])
    (problem,) = caught.value.problems
    assert problem.key == key
    assert words in problem.problem
    assert problem.remedy


@pytest.mark.parametrize("overrides", ALLOWED)
def test_what_composes_is_allowed(model, overrides):
    load_config(None, [f"model.hf_path={model}", *overrides])
