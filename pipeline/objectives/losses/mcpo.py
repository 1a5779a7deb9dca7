"""MCPO: PPO's clipped surrogate, and a hinge that keeps the policy where it is on prompts it has mastered."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import ObjectiveConfig, RunConfig
from pipeline.methods import loss_method
from pipeline.objectives.losses import ppo
from pipeline.objectives.losses._inputs import Inputs
from pipeline.objectives.tokens import Tokens

METHOD = loss_method(
    "mcpo",
    "2604.16972",
    "A / (2 sqrt(p (1 - p))) beyond p = .5; where p = 1 the loss is max(0, k3 - .01) of log pi / pi_old",
    "objective.advantage=mcpo",
    evidence="summary",
)

MASTERED = 1  # the mark of a token whose prompt has correct samples alone


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's surrogate, plus beta max(0, k3 - delta) on the tokens marked ``MASTERED``, with k3 = r - 1 - log r.

    arXiv 2604.16972, from a note with the equations. Defaults: delta 0.01, beta 1. Unknown, and chosen by us: the hinge
    is taken token by token, and k3 is the estimator of KL(pi_old || pi), since the old policy drew the tokens.
    """
    loss, bounded = ppo.surrogate(inputs, objective)
    gap = inputs.ratio - 1 - (inputs.log_probs - inputs.old)
    hinge = objective.mcpo.beta * (gap - objective.mcpo.delta).clamp(min=0)
    return torch.where(inputs.marked(MASTERED), loss + hinge, loss), bounded


def mark(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Mark the tokens of prompts whose samples are all correct."""
    return replace(tokens, marks=(tokens.accuracy == 1).to(torch.uint8) * MASTERED)
