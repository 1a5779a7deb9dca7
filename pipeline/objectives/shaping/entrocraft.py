"""Entrocraft: outside the band, learn from one kind of response only."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.entropy.band import Band
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens

METHOD = shaping_method(
    "entrocraft", "2604.26326", "above the band correct responses only (A = 1), below it A < 0 only"
)


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Mean entropy above the band: correct responses only, with A = 1; below: responses with A < 0 only; within: as it
    is.

    arXiv 2604.26326 (public code read). The bounds are ``entropy.band`` with its schedule (constant, linear and cosine
    are the paper's; it goes e.g. from [0.6, 0.7] to [0.4, 0.5]). Responses left out have weight 0, denominators stay.
    Here advantages below the band stay GRPO's. The public code gives every wrong response A = -1 there, those of groups
    without a correct one included.
    """
    low, high = Band(config.entropy.band, config.steps).at(step)
    entropy = float(tokens.entropy.mean())
    if low <= entropy <= high:
        return tokens
    if entropy > high:
        return replace(tokens, advantages=torch.ones_like(tokens.advantages), scale=tokens.scale * tokens.correct)
    return replace(tokens, scale=tokens.scale * (tokens.advantages < 0))
