"""CE-GPPO: tokens that PPO would clip keep a bounded gradient."""

from __future__ import annotations

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import loss_method
from pipeline.objectives.losses._inputs import Inputs

METHOD = loss_method("ce_gppo", "2509.20712", "clipped tokens keep a bounded gradient: .5 below the range, 1 above")

CEILING = 3.0  # of the ratio where A < 0 (``clip_ratio_c`` of the public code)


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """-A r, times beta_low (1 - clip_low) / sg(r) where r < 1 - clip_low and A < 0, times beta_high (1 + clip_high) /
    sg(r) where r > 1 + clip_high and A > 0 (arXiv 2509.20712; public code read).

    Where A < 0 the loss is at most -A ``CEILING``, as in the public code.
    So the gradient of a clipped token has a fixed size instead of 0. Defaults: beta_low 0.5 (0.5 to 0.75 published),
    beta_high 1.
    """
    ratio, advantages, betas = inputs.ratio, inputs.advantages, objective.ce_gppo
    low = (ratio < 1 - objective.clip_low) & (advantages < 0)
    high = (ratio > 1 + objective.clip_high) & (advantages > 0)
    loss = -advantages * ratio
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * CEILING), loss)
    loss = torch.where(low, -advantages * betas.beta_low * (1 - objective.clip_low) * inputs.identity, loss)
    loss = torch.where(high, -advantages * betas.beta_high * (1 + objective.clip_high) * inputs.identity, loss)
    return loss, low | high
