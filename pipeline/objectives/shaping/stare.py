"""STARE: while entropy is low, surprising tokens of good responses count more."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens

METHOD = shaping_method("stare", "2606.19236", "while H < .3: x 1.1 on positives' 10 % most surprising tokens")
FRACTION = 0.1  # of the tokens that the actuator chooses among, as published


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """While the step's mean entropy is below ``target``: weight ``positive`` on the share ``fraction`` of highest
    surprisal -log pi among the tokens with A > 0, and ``negative`` on the same share among those with A < 0.

    arXiv 2606.19236, section 4 (public code read). Defaults: target 0.3, fraction 0.1, positive 1.1, negative 1 (the
    paper's variant O1; 0.9 is C2). The adaptive schedule of its section 4.4 is the controller ``stare``; it is off in
    the paper's own script, and a note on the paper says that it scored below the fixed weights there.
    """
    parameters = config.objective.stare
    if not tokens.entropy.mean() < parameters.target:
        return tokens
    tokens = _weighted(tokens, tokens.advantages > 0, parameters.fraction, parameters.positive)
    return _weighted(tokens, tokens.advantages < 0, parameters.fraction, parameters.negative)


def amplify(tokens: Tokens, command: float) -> Tokens:
    """Weight 1 + ``command`` on the 10 % of highest surprisal among the tokens with A > 0: the actuator ``stare``."""
    return _weighted(tokens, tokens.advantages > 0, FRACTION, 1 + command)


def _weighted(tokens: Tokens, among: torch.Tensor, fraction: float, weight: float) -> Tokens:
    count = math.ceil(fraction * int(among.sum()))
    chosen = tokens.top(-tokens.log_probs, count, among)
    return replace(tokens, scale=torch.where(chosen, tokens.scale * weight, tokens.scale))
