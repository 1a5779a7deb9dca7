"""STARE: while entropy is low, surprising tokens of good responses count more."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens

METHOD = shaping_method("stare", "2606.19236", "while H < .3: x 1.1 on positives' 10 % most surprising tokens")


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """While the step's mean entropy is below ``target``: weight ``positive`` on the share ``fraction`` of highest
    surprisal -log pi among the tokens with A > 0, and ``negative`` on the same share among those with A < 0.

    arXiv 2606.19236, section 4 (public code read). Defaults: target 0.3, fraction 0.1, positive 1.1, negative 1 (the
    paper's variant O1; 0.9 is C2). The adaptive schedule of its section 4.4 is not offered: it is off in the paper's
    own script, and a note on the paper says that it scored below the fixed weights there.
    """
    parameters = config.objective.stare
    if not tokens.entropy.mean() < parameters.target:
        return tokens
    scale = tokens.scale
    for among, weight in ((tokens.advantages > 0, parameters.positive), (tokens.advantages < 0, parameters.negative)):
        count = math.ceil(parameters.fraction * int(among.sum()))
        scale = torch.where(tokens.top(-tokens.log_probs, count, among), scale * weight, scale)
    return replace(tokens, scale=scale)
