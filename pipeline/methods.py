"""The methods by name: what each is, where it comes from, and the configuration that switches it on.

An advantage, a loss, a token shaping, an actuator and a controller say it in their own files (``METHOD``), as
``pipeline.registry`` lists them. ``isentrope lab methods`` and docs/methods.md print the table of all of them.
Overrides are on top of any configuration without entropy control (``entropy.controller=none``) and one update per step;
parameters are the published defaults where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pipeline.registry import load, names

GRPO = ("entropy.controller=none",)
OFF_POLICY_STEP = "learner.updates_per_step=2"  # with one update every ratio is 1 and nothing is clipped
OFF_POLICY = (*GRPO, OFF_POLICY_STEP)

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
    """One row. ``overrides`` are ``key=value`` words for the command line; empty where ``missing`` says why it is not
    offered.
    """

    name: str
    kind: str  # advantage | loss | token shaping | sampler | actuator | controller | recipe (several of them)
    source: str  # arXiv number, or who
    rule: str
    evidence: str  # key of ``EVIDENCE``
    overrides: tuple[str, ...] = ()
    missing: str = ""


def advantage_method(name: str, source: str, rule: str, *more: str) -> Method:
    """A way from rewards to advantages; GRPO's is the default. ``more``: further overrides."""
    switch = () if name == "grpo" else (f"objective.advantage={name}",)
    return Method(name, "advantage", source, rule, "code", (*GRPO, *switch, *more))


def loss_method(name: str, source: str, rule: str, *more: str, evidence: str = "code") -> Method:
    """A surrogate loss; ``more``: further overrides."""
    return Method(name, "loss", source, rule, evidence, (*OFF_POLICY, f"objective.loss={name}", *more))


def shaping_method(name: str, source: str, rule: str, *more: str, evidence: str = "code", shaping: str = "") -> Method:
    """A token shaping; ``more``: further overrides. ``shaping``: what the configuration calls it, where that is not
    ``name``.
    """
    switch = f"objective.token_shaping=[{shaping or name}]"
    return Method(name, "token shaping", source, rule, evidence, (*GRPO, switch, *more))


def actuator_method(name: str, source: str, rule: str, evidence: str, controller: str, *more: str) -> Method:
    """An actuator under somebody else's controller; ``more``: further overrides."""
    return controller_method(
        name, source, rule, evidence, f"entropy.actuator={name}", *more, controller=controller, kind="actuator"
    )


def controller_method(
    name: str, source: str, rule: str, evidence: str, *more: str, controller: str = "", kind: str = "controller"
) -> Method:
    """A published controller; ``more``: its actuator and further overrides. ``controller``: what the configuration
    calls it, where that is not ``name``.
    """
    return Method(name, kind, source, rule, evidence, (f"entropy.controller={controller or name}", *more))


def pi_method(actuator: str, rule: str, *more: str) -> Method:
    """An actuator under our own controller, the one PI law on all of them. ``rule``: what the actuator does; ``more``:
    further overrides.
    """
    switch = f"entropy.actuator={actuator}"
    name, rule = f"isentrope_{actuator}", f"PI on ln H, {rule}"
    return controller_method(name, "this project", rule, "ours", switch, *more, controller="pi")


def _absent(name: str, kind: str, source: str, rule: str, evidence: str, missing: str) -> Method:
    return Method(name, kind, source, rule, evidence, missing=missing)


CLIP_HIGHER = ("objective.clip_high=0.28", "objective.dual_clip=10")


def _of(package: str) -> Iterator[Method]:
    """``METHOD`` of each file of a package; one without it is a default, whose row is another's."""
    modules = (load(package, name) for name in names(package))
    yield from (module.METHOD for module in modules if hasattr(module, "METHOD"))


def _recipes() -> Iterator[Method]:
    """Several keys that are one method."""
    yield Method(
        "dapo",
        "recipe",
        "2503.14476",
        "clip-higher .2/.28, dual clip 10, token mean, overlong filter, groups of equal reward drawn anew",
        "code",
        (*OFF_POLICY, *CLIP_HIGHER, "objective.overlong.filter=true", "rollout.sampling_rounds=10"),
    )


def _samplers() -> Iterator[Method]:
    yield Method(
        "cuts",
        "sampler",
        "2604.18493",
        "half of each group uniform among the 5 likeliest tokens of p >= .03, after 5 tokens (Mixed-CUTS)",
        "summary",
        (*GRPO, "rollout.cuts.share=0.5"),
    )


def _not_offered() -> Iterator[Method]:
    """What is known of and left out."""
    yield _absent(
        "s2l_po", "sampler", "2605.30789", "the first part of each group from a frozen smaller sibling, ever less of "
        "it", "code",
        "engines serve one model; this needs a second, frozen one beside it",
    )  # fmt: skip
    yield _absent(
        "adapo", "controller", "2603.11682", "clip_high grows while H is low and shrinks while it is high", "summary",
        "the sizes of its steps were not found; adaptive_clip moves the same bound by published steps",
    )  # fmt: skip
    yield _absent(
        "heal", "sampler", "2604.17928", "general-domain prompts chosen by (1 - 2 |accuracy - .5|) times the mean of "
        "the 20 % highest entropies; reward +1 for an entropy trace like theirs", "code",
        "it trains on 384 general-domain prompts beside the task's, and a run has one source of prompts",
    )  # fmt: skip
    yield _absent(
        "uec_rl", "sampler", "2604.14646", "a group without a correct sample is drawn again, 20 times at T = 1.1, for "
        "its samples of A > .5; every 5 steps those of A > 1 of the last steps are trained on once more", "code",
        "no round draws single prompts again at another temperature, and rows of older weights are not kept",
    )  # fmt: skip
    for name in ("papo", "aem", "gcpo", "oger", "gxpo", "sps", "imax", "longact", "aer"):
        yield _absent(name, "-", "-", "-", "abstract", "its formula is not public beyond the abstract")


@cache
def all_methods() -> dict[str, Method]:
    """Every method by its name, in the order in which they are shown. Imports the methods' files, and with them
    torch.
    """
    rows = (
        *_of("pipeline.objectives.advantages"),
        *_recipes(),
        *_of("pipeline.objectives.losses"),
        *_of("pipeline.objectives.shaping"),
        *_samplers(),
        *_of("pipeline.entropy.actuators"),
        *_of("pipeline.entropy.controllers"),
        *_not_offered(),
    )
    return {method.name: method for method in rows}
