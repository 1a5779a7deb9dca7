"""Gaussian covariance weighting: tokens of unusual covariance, of either sign, count less."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens

METHOD = shaping_method("gaussian_cov", "2605.11538", "A w N / sum w, w = exp(-c^2 / (2 var c))", evidence="summary")


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """A <- A w N / sum w with w = exp(-c^2 / (2 var c)), c the covariance of each token over the whole step.

    arXiv 2605.11538 (read in a summary). The weights' mean is 1. Without any variance all weigh the same.
    """
    covariance = tokens.covariance
    variance = covariance.var(correction=0)
    if not variance > 0:
        return tokens
    weights = torch.exp(-covariance.square() / (2 * variance))
    return replace(tokens, advantages=tokens.advantages * weights / weights.mean())
