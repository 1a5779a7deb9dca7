"""Which tokens KL-Cov holds; the penalty is in ``losses.kl_cov``."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.objectives.losses.kl_cov import HELD
from pipeline.objectives.shaping.tokens import Tokens


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Mark the max(1, int(fraction N)) tokens of highest covariance over the whole step (arXiv 2505.22617, section 4.2)."""
    covariance = tokens.covariance
    count = max(1, int(config.objective.kl_cov.fraction * len(covariance)))
    return replace(tokens, marks=tokens.top(covariance, count).to(torch.uint8) * HELD)
