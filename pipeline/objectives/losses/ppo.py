"""PPO's clipped surrogate, with DAPO's clip-higher and dual clip: the loss of GRPO."""

from __future__ import annotations

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.losses.inputs import Inputs


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); with dual clip at most -A dual_clip where A < 0.

    arXiv 1707.06347, equation 7; a separate upper range and dual clip: DAPO, 2503.14476, section 3.1 (0.2, 0.28, 10; public code
    read). Defaults: 0.2, 0.2, no dual clip.
    """
    ratio, advantages = inputs.ratio, inputs.advantages
    high = (ratio > 1 + objective.clip_high) & (advantages > 0)
    low = (ratio < 1 - objective.clip_low) & (advantages < 0)
    return clipped(ratio, advantages, objective), high | low


def clipped(ratio: torch.Tensor, advantages: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """The loss above, of any ratio ``[n]``."""
    bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    return dual_clip(torch.maximum(-advantages * ratio, -advantages * bounded), advantages, objective)


def dual_clip(loss: torch.Tensor, advantages: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """At most ``-A dual_clip`` where A < 0; unchanged where dual clip is off."""
    if objective.dual_clip > 0:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * objective.dual_clip), loss)
    return loss
