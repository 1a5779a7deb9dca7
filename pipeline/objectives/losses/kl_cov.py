"""KL-Cov: no clipping, but a penalty that holds the tokens of highest covariance where they were."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import ObjectiveConfig, RunConfig
from pipeline.methods import loss_method
from pipeline.objectives.losses._inputs import Inputs
from pipeline.objectives.tokens import Tokens

METHOD = loss_method(
    "kl_cov", "2505.22617", "-A r, and |log pi - log pi_old| on the .2 % of tokens of highest covariance"
)

HELD = 1  # the mark of a penalised token


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """-A r, plus coef |log pi - log pi_old| on the tokens marked ``HELD`` (arXiv 2505.22617, section 4.2; public code
    read).

    ``mark`` marks the share ``kl_cov.fraction`` of highest covariance over the whole step; public code ranks within a
    micro-batch, so that its result depends on the micro-batch size. Defaults: coef 1, fraction 2e-3 (the paper's for
    7B; 2e-4 for 32B). The penalty has no gradient while the policy is still the old one: it needs ``updates_per_step``
    > 1.
    """
    held = inputs.marked(HELD)
    penalty = objective.kl_cov.coef * (inputs.log_probs - inputs.old).abs()
    loss = -inputs.advantages * inputs.ratio
    return torch.where(held, loss + penalty, loss), held


def mark(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Mark the max(1, int(fraction N)) tokens of highest covariance over the whole step (arXiv 2505.22617, section
    4.2).
    """
    covariance = tokens.covariance
    count = max(1, int(config.objective.kl_cov.fraction * len(covariance)))
    return replace(tokens, marks=tokens.top(covariance, count).to(torch.uint8) * HELD)
