"""The methods by name: what each is, where it comes from, and the configuration that switches it on.

``isentrope lab methods`` and docs/methods.md print this table. Overrides are on top of any configuration without entropy control
(``entropy.controller=none``) and one update per step; parameters are the published defaults where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GRPO = ("entropy.controller=none",)
OFF_POLICY = (*GRPO, "learner.updates_per_step=2")  # without, every ratio is 1 and nothing is clipped

# How well a rule is known.
EVIDENCE = {
    "code": "public code read",
    "third-party code": "somebody else's public code read",
    "summary": "a secondary summary of the paper read",
    "ours": "our own, derived or measured here",
    "abstract": "the abstract only",
}


@dataclass(frozen=True)
class Method:
    """One row. ``overrides`` are ``key=value`` words for the command line; empty where ``missing`` says why it is not offered."""

    name: str
    kind: str  # advantage | loss | token shaping | sampler | actuator | controller | recipe (several of them)
    source: str  # arXiv number, or who
    rule: str
    evidence: str  # key of ``EVIDENCE``
    overrides: tuple[str, ...] = ()
    missing: str = ""


def _loss(name: str, source: str, rule: str, *more: str) -> Method:
    return Method(name, "loss", source, rule, "code", (*OFF_POLICY, f"objective.loss={name}", *more))


def _advantage(name: str, source: str, rule: str, *more: str) -> Method:
    return Method(name, "advantage", source, rule, "code", (*GRPO, f"objective.advantage={name}", *more))


def _shaping(name: str, source: str, rule: str, evidence: str = "code", *more: str, shaping: str = "") -> Method:
    """``shaping``: what the configuration calls it, where that is not ``name``."""
    switch = f"objective.token_shaping=[{shaping or name}]"
    return Method(name, "token shaping", source, rule, evidence, (*GRPO, switch, *more))


def _controlled(name: str, kind: str, source: str, rule: str, evidence: str, controller: str, *more: str) -> Method:
    return Method(name, kind, source, rule, evidence, (f"entropy.controller={controller}", *more))


def _absent(name: str, kind: str, source: str, rule: str, evidence: str, missing: str) -> Method:
    return Method(name, kind, source, rule, evidence, missing=missing)


_CLIP_HIGHER = ("objective.clip_high=0.28", "objective.dual_clip=10")


def _advantages() -> Iterator[Method]:
    """GRPO's and what may take its place."""
    yield Method(
        "grpo", "advantage", "2402.03300", "A = (r - mean) / std of the group; PPO's clipped loss", "code", GRPO
    )
    yield _advantage(
        "dr_grpo", "2503.20783", "A = r - mean of the group; sum / max_new_tokens", "objective.aggregation=dr_grpo"
    )
    yield _advantage("rloo", "2402.14740", "A = r - mean of the others of the group")
    yield _advantage("reinforce_pp", "2501.03262", "A = (r - mean) / std over the whole step")
    yield _advantage("reinforce_pp_baseline", "2501.03262", "A = (r - mean of the group) / std over the whole step")
    yield _advantage("pass_at_k", "2508.10751", "A = A_grpo / 2 + A_k / 2, A_k the analytic advantage of pass@4")


def _losses() -> Iterator[Method]:
    """Surrogates, DAPO's recipe first."""
    yield Method(
        "dapo",
        "recipe",
        "2503.14476",
        "clip-higher .2/.28, dual clip 10, token mean, overlong filter, groups of equal reward drawn anew",
        "code",
        (*OFF_POLICY, *_CLIP_HIGHER, "objective.overlong.filter=true", "rollout.sampling_rounds=10"),
    )
    yield _loss(
        "gspo",
        "2507.18071",
        "ratio of the whole sequence (geometric mean over tokens), clipped at 3e-4, 4e-4; mean of sequences",
        *("objective.aggregation=sequence_mean", "objective.clip_low=3e-4", "objective.clip_high=4e-4"),
    )
    yield _loss(
        "cispo",
        "2506.13585",
        "-sg(min(r, 1.2)) A log pi: truncated weights, no token loses its gradient",
        *("objective.clip_low=1", "objective.clip_high=0.2"),
    )
    yield _loss("ce_gppo", "2509.20712", "clipped tokens keep a bounded gradient: .5 below the range, 1 above")
    yield _loss("kl_cov", "2505.22617", "-A r, and |log pi - log pi_old| on the .2 % of tokens of highest covariance")
    yield _loss(
        "htpo",
        "2605.08283",
        "by difficulty, correctness and entropy: tokens left out, or pulled back beyond the range",
        *_CLIP_HIGHER,
    )


def _shapings() -> Iterator[Method]:
    """Weights and advantages of single tokens."""
    yield _shaping(
        "clip_cov",
        "2505.22617",
        "no loss on .02 % of tokens, at random among those with 1 < Cov < 5; clip 1, dual clip 10",
        "code",
        *("objective.clip_low=1", "objective.clip_high=1", "objective.dual_clip=10"),
    )
    yield _shaping("gaussian_cov", "2605.11538", "A w N / sum w, w = exp(-c^2 / (2 var c))", "summary")
    yield _shaping("entropy_adv", "2506.14758", "A += min(.4 H, |A| / 2)", "third-party code")
    yield _shaping(
        "high_entropy_tokens",
        "2506.01939",
        "loss on the 20 % of tokens of highest entropy only",
        shaping="high_entropy",
    )
    yield _shaping("stare", "2606.19236", "while H < .3: x 1.1 on positives' 10 % most surprising tokens")
    yield _shaping(
        "rlrt",
        "2605.10781",
        "in correct responses A x (.5 + .5 clip(pi / pi_shown-a-peer, .8, 1.2)); mix, clip and prompt ours",
        "third-party code",
    )
    yield _shaping(
        "opefo",
        "2605.11491",
        "x (1 + l) where dH > 0, x (1 - l) where dH < 0: predicted changes cancel",
        "summary",
    )
    yield _shaping("entrocraft", "2604.26326", "above the band correct responses only (A = 1), below it A < 0 only")


def _levers() -> Iterator[Method]:
    """A sampler, and actuators by themselves."""
    yield Method(
        "cuts",
        "sampler",
        "2604.18493",
        "half of each group uniform among the 5 likeliest tokens of p >= .03, after 5 tokens (Mixed-CUTS)",
        "summary",
        (*GRPO, "rollout.cuts.share=0.5"),
    )
    yield _controlled(
        "entropy_bonus",
        "actuator",
        "-",
        "loss -= .01 H, constant (the coefficient is ours)",
        "ours",
        "constant",
        *("entropy.actuator=entropy_bonus", "entropy.command=0.01"),
    )
    yield _controlled(
        "dcpo",
        "actuator",
        "2601.12730",
        "A <- (1 - a) A + a 1[R] pi_T / pi, a from min(|H0 - H|, .1) / accuracy",
        "code",
        "scope",
        "entropy.actuator=dcpo",
    )


def _controllers() -> Iterator[Method]:
    """Published loops; among them our own, one PI law on every actuator."""
    yield _controlled(
        "scope",
        "controller",
        "2510.08141 v7",
        "correct samples of a second rollout at T = clip(1 + H0 - H, .8, 1.2), over all drawn",
        "summary",
        "scope",
        *("entropy.actuator=resample", "entropy.positive_mean=samples"),
    )
    yield _controlled(
        "aepo",
        "controller",
        "2510.08141 v1-v6",
        "the same at T = 1.2 or .8; positives replace as many main rows",
        "code",
        "bang_bang",
        *("entropy.actuator=resample", "entropy.positive_mean=main", "entropy.auxiliary_replaces=true"),
    )
    for actuator, rule in (
        ("resample", "PI on ln H, correct samples of a second rollout at T"),
        ("reweight", "PI on ln H, correct main rows weighted by pi_T / pi"),
        ("fc", "PI on ln H, A += c (min(pi_T / pi, 8) - 1)"),
        ("tok", "PI on ln H, A += u c clip(-(log pi + H), -3, 3)"),
        ("clip_cov", "PI on ln H, no loss on the share of tokens of highest covariance"),
        ("entropy_bonus", "PI on ln H, loss -= u H"),
        ("high_prob", "PI on ln H, A -= u |A| on tokens with pi > .95 (EntroPIC's actuator)"),
    ):
        name = f"isentrope_{actuator}"
        yield _controlled(name, "controller", "this project", rule, "ours", "pi", f"entropy.actuator={actuator}")
    bonus = "entropy.actuator=entropy_bonus"
    yield _controlled(
        "skywork", "controller", "Skywork-OR1", "beta += D if H < target else -D, in [0, .005]; bonus on while H < target", "code",
        "skywork", bonus,
    )  # fmt: skip
    yield _controlled(
        "aent", "controller", "2509.03493", "beta held in [1e-5, .01] by the distance of H to the band; here of the whole entropy, not of "
        "the likeliest 80 % of the vocabulary", "code", "aent", bonus,
    )  # fmt: skip
    yield _controlled(
        "entropic", "controller", "2511.15248", "PI coefficient in [-1, 1] of -r|A| on tokens with pi > .95", "summary",
        "entropic", "entropy.actuator=high_prob",
    )  # fmt: skip


def _not_offered() -> Iterator[Method]:
    """What is known of and left out."""
    yield _absent(
        "s2l_po", "sampler", "2605.30789", "the first part of each group from a frozen smaller sibling, ever less of it", "code",
        "engines serve one model; this needs a second, frozen one beside it",
    )  # fmt: skip
    for name in ("papo", "aem", "gcpo", "mcpo", "avspo", "oger", "gxpo", "sps", "imax", "longact", "aer"):
        yield _absent(name, "-", "-", "-", "abstract", "its formula is not public beyond the abstract")


_KINDS = (_advantages, _losses, _shapings, _levers, _controllers, _not_offered)  # in the order in which they are shown
METHODS: dict[str, Method] = {method.name: method for rows in _KINDS for method in rows()}
