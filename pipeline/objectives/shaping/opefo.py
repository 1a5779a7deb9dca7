"""OPEFO: balance the tokens that raise the entropy against those that lower it."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens

METHOD = shaping_method(
    "opefo",
    "2605.11491",
    "x (1 + l) where dH > 0, x (1 - l) where dH < 0: predicted changes cancel",
    evidence="summary",
)


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Weight 1 + l where the token's entropy change is positive, 1 - l where it is negative.

    l = (sum of |dH| where negative - sum where positive) / (both), so the predicted changes cancel to first order
    whenever that takes no weight below 0 (arXiv 2605.11491, read in a summary). dH is ``Tokens.entropy_change`` times
    the token's weight in the loss. Strictly on-policy.
    """
    change = tokens.entropy_change * tokens.weights
    up, down = change.clamp(min=0).sum(), -change.clamp(max=0).sum()
    if not up + down > 0:
        return tokens
    balance = (down - up) / (up + down)
    weights = torch.where(change > 0, 1 + balance, torch.where(change < 0, 1 - balance, 1.0))
    return replace(tokens, scale=tokens.scale * weights)
