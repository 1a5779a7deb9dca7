"""Builds the requests that one step sends to the engines, and drops answers drawn by older weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.config.schema import RunConfig
from pipeline.seeds import sample_seeds
from pipeline.types import ControlDecision, Cuts, GenerateRequest, Prompt, Role, SampleGroup

ALWAYS = 0  # the step that repeated samples take their seeds from


def step_requests(
    prompts: Sequence[Prompt], decision: ControlDecision, config: RunConfig, step: int
) -> list[GenerateRequest]:
    """Main requests for every prompt at T=1, then auxiliary ones at T+ for the first ``decision.auxiliary_prompts``."""

    cuts = _cuts(config)

    def request(prompt: Prompt, role: Role, count: int, temperature: float) -> GenerateRequest:
        seeds = sample_seeds(config.seed, step, prompt.id, count, role)
        rule = cuts if role is Role.MAIN else None
        return GenerateRequest(prompt, seeds, temperature, config.rollout.max_new_tokens, role, cuts=rule)

    main = [request(p, Role.MAIN, config.rollout.samples_per_prompt, 1.0) for p in prompts]
    resampled = prompts[: decision.auxiliary_prompts]
    auxiliary = [request(p, Role.AUXILIARY, config.entropy.auxiliary_samples, decision.temperature) for p in resampled]
    return main + auxiliary


def repeated_requests(prompts: Sequence[Prompt], config: RunConfig) -> list[GenerateRequest]:
    """One sample at T=1 of each prompt, with the same seeds at every step."""

    def request(prompt: Prompt) -> GenerateRequest:
        seeds = sample_seeds(config.seed, ALWAYS, prompt.id, 1, Role.REPEATED)
        return GenerateRequest(prompt, seeds, 1.0, config.rollout.max_new_tokens, Role.REPEATED)

    return [request(prompt) for prompt in prompts]


def _cuts(config: RunConfig) -> Cuts | None:
    """The rule for the second part of each group, if there is one."""
    cuts = config.rollout.cuts
    samples = round(cuts.share * config.rollout.samples_per_prompt)
    return Cuts(samples, cuts.top, cuts.floor, cuts.warmup_tokens) if samples else None


def only_fresh(groups: Sequence[SampleGroup], version: int) -> tuple[list[SampleGroup], int]:
    """Drop samples with any token from older weights than ``version``; returns the groups and how many were dropped."""
    fresh = [replace(group, samples=tuple(s for s in group.samples if s.drawn_since(version))) for group in groups]
    dropped = sum(len(old.samples) - len(new.samples) for old, new in zip(groups, fresh, strict=True))
    return (fresh, dropped) if dropped else (list(groups), 0)
