"""Losses, advantages and token shapings: what does not go together, refused with key, value and remedy."""

import pytest

TWO = "learner.updates_per_step=2"
GSPO = [TWO, "objective.loss=gspo", "objective.aggregation=sequence_mean"]
BROKEN = {
    "gspo on-policy": (GSPO[1:], "objective.loss", "every ratio is exactly 1"),
    "cispo on-policy": (["objective.loss=cispo"], "objective.loss", "every ratio is exactly 1"),
    "ce_gppo on-policy": (["objective.loss=ce_gppo"], "objective.loss", "every ratio is exactly 1"),
    "kl_cov on-policy": (["objective.loss=kl_cov"], "objective.loss", "every ratio is exactly 1"),
    "mcpo on-policy": (["objective.loss=mcpo"], "objective.loss", "every ratio is exactly 1"),
    "kl_cov dual clip": (
        [TWO, "objective.loss=kl_cov", "objective.dual_clip=10"],
        "objective.dual_clip",
        "bounds of its own",
    ),
    "gspo token mean": (GSPO[:2], "objective.aggregation", "mean of sequences"),
    "gspo clip_cov": (
        [*GSPO, "objective.token_shaping=[clip_cov]"],
        "objective.token_shaping",
        "clips whole sequences",
    ),
    "opefo off-policy": ([TWO, "objective.token_shaping=[opefo]"], "learner.updates_per_step", "strictly on-policy"),
    "clip range on-policy": (["entropy.actuator=clip_high"], "entropy.actuator", "every ratio is exactly 1"),
    "clip range of a loss without": (
        [TWO, "entropy.actuator=clip_high", "objective.loss=kl_cov"],
        "entropy.actuator",
        "clips no ratio",
    ),
    "a correction of stale rows to the engine's own log-probs": (
        ["objective.correction.kind=tis", "rollout.staleness=1"],
        "objective.correction.kind",
        "no effect on stale rows",
    ),
    "old log-probs of fresh rows": (["objective.old_log_probs=learner"], "objective.old_log_probs", "no effect"),
    "stale rows as if fresh": (
        ["objective.old_log_probs=learner", "rollout.staleness=1"],
        "objective.old_log_probs",
        "nothing would make up for the age",
    ),
    "opefo on stale rows": (
        ["rollout.staleness=1", "objective.token_shaping=[opefo]"],
        "rollout.staleness",
        "strictly on-policy",
    ),
    "an age that no token has": (
        ["objective.max_age=2", "rollout.staleness=2", "rollout.partial=true"],
        "objective.max_age",
        "bounds the age",
    ),
    "an age that whole responses have": (
        ["objective.max_age=1", "rollout.staleness=2"],
        "objective.max_age",
        "all tokens of a response are of one",
    ),
    "opefo first": (["objective.token_shaping=[opefo,stare]"], "objective.token_shaping", "upsets the balance"),
    "twice": (["objective.token_shaping=[stare,stare]"], "objective.token_shaping", "stare is named twice"),
    "two Clip-Covs": (
        ["objective.token_shaping=[clip_cov]", "entropy.actuator=clip_cov"],
        "entropy.actuator",
        "weighs the tokens that objective.token_shaping=[clip_cov] weighs already",
    ),
    "clip_cov limits": (
        ["objective.token_shaping=[clip_cov]", "objective.clip_cov.low=5"],
        "objective.clip_cov.low",
        "not below",
    ),
    "idle kl_cov": (["objective.kl_cov.coef=2"], "objective.kl_cov.coef", "no effect without objective.loss=kl_cov"),
    "idle pass_at_k": (
        ["objective.pass_at_k.share=1"],
        "objective.pass_at_k.share",
        "without objective.advantage=pass_at_k",
    ),
    "idle stare": (
        ["objective.stare.target=1"],
        "objective.stare.target",
        "no effect without objective.token_shaping=[stare]",
    ),
    "pass@k of all": (
        ["objective.advantage=pass_at_k", "objective.pass_at_k.samples=16"],
        "objective.pass_at_k.samples",
        "needs fewer than all",
    ),
    "rlrt budget": (
        ["objective.token_shaping=[rlrt]", "learner.max_tokens_per_micro_batch=2048"],
        "learner.max_tokens_per_micro_batch",
        "up to 4096 tokens",
    ),
    "rlrt positions": (
        ["objective.token_shaping=[rlrt]", "rollout.max_new_tokens=1025"],
        "objective.token_shaping",
        "up to 4098 tokens, but the model has 4096 positions",
    ),
    "overlong": (["objective.overlong.buffer=1025"], "objective.overlong.buffer", "longer than a response"),
    "idle penalty": (["objective.overlong.penalty=2"], "objective.overlong.penalty", "no effect while"),
    "cuts on SGLang": (
        ["rollout.cuts.share=0.5", "rollout.engine=sglang"],
        "rollout.cuts.share",
        "engine sglang has no such sampling rule",
    ),
    "idle cuts": (["rollout.cuts.top=3"], "rollout.cuts.top", "no effect while rollout.cuts.share is 0"),
    "no cuts": (["rollout.cuts.share=0.01"], "rollout.cuts.share", "is none of the 16 samples"),
    "replaces": (["entropy.auxiliary_replaces=true"], "entropy.auxiliary_replaces", "draws no auxiliary rows"),
}
ALLOWED = [
    GSPO,
    [*GSPO, "objective.token_shaping=[entrocraft]"],
    [TWO, "objective.loss=kl_cov", "objective.kl_cov.fraction=2e-4", "objective.advantage=rloo"],
    ["objective.loss=htpo", "objective.dual_clip=10", "objective.token_shaping=[entropy_adv,stare,opefo]"],
    ["objective.token_shaping=[clip_cov]", "entropy.actuator=entropy_bonus"],
    ["objective.token_shaping=[rlrt]", "learner.max_tokens_per_micro_batch=4096"],
    ["objective.advantage=pass_at_k", "objective.pass_at_k.samples=15"],
    ["rollout.cuts.share=0.5", "rollout.cuts.top=3", "rollout.sampling_rounds=3"],
    ["entropy.actuator=resample", "entropy.auxiliary_replaces=true", "entropy.positive_mean=main"],
]


@pytest.mark.parametrize("name", BROKEN)
def test_nonsense_is_refused(refused, name):
    refused(*BROKEN[name])


@pytest.mark.parametrize("overrides", ALLOWED)
def test_what_composes_is_allowed(problems, overrides):
    assert problems(*overrides) == ()
