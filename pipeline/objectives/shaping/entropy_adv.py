"""EntropyAdv: uncertain tokens get a larger advantage."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens

METHOD = shaping_method("entropy_adv", "2506.14758", "A += min(.4 H, |A| / 2)", evidence="third-party code")


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """A <- A + min(scale H, |A| / divisor), H without gradient (arXiv 2506.14758, equation 5; third-party code read).

    The bound keeps the sign of A. Defaults: scale 0.4, divisor 2.
    """
    parameters = config.objective.entropy_adv
    bonus = torch.minimum(parameters.scale * tokens.entropy, tokens.advantages.abs() / parameters.divisor)
    return replace(tokens, advantages=tokens.advantages + bonus)
