"""Clip-Cov: a few tokens of high covariance take no part in the update."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens
from pipeline.seeds import stream_seed

METHOD = shaping_method(
    "clip_cov",
    "2505.22617",
    "no loss on .02 % of tokens, at random among those with 1 < Cov < 5; clip 1, dual clip 10",
    "objective.clip_low=1",
    "objective.clip_high=1",
    "objective.dual_clip=10",
)


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Weight 0 on max(1, int(fraction N)) tokens drawn at random among those with low < Cov < high.

    arXiv 2505.22617, section 4.1 (public code read); Cov with means over the whole step, where public code takes them
    over a micro-batch. Defaults: fraction 2e-4, 1 < Cov < 5. Nothing is PPO-clipped before the first update, so
    nothing is spared for that. The draw depends on the run's seed and the step alone.
    """
    limits = config.objective.clip_cov
    covariance = tokens.covariance
    candidates = ((covariance > limits.low) & (covariance < limits.high)).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(stream_seed(config.seed, f"clip_cov/{step}"))
    drawn = torch.randperm(len(candidates), generator=generator)[: _count(limits.fraction, covariance)]
    return _without(tokens, candidates[drawn])


def detach_top(tokens: Tokens, fraction: float) -> Tokens:
    """Weight 0 on the share ``fraction`` of highest covariance: the actuator ``clip_cov``.

    Unlike the paper's Clip-Cov this takes the top ones, as its KL-Cov does: the fraction is then the only knob.
    """
    covariance = tokens.covariance
    return _without(tokens, tokens.top(covariance, _count(fraction, covariance)))


def _count(fraction: float, covariance: torch.Tensor) -> int:
    return max(1, int(fraction * len(covariance)))


def _without(tokens: Tokens, chosen: torch.Tensor) -> Tokens:
    scale = tokens.scale.clone()
    scale[chosen] = 0.0
    return replace(tokens, scale=scale)
