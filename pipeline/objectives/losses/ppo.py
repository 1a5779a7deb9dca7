"""PPO's clipped surrogate, with DAPO's clip-higher and dual clip: the loss of GRPO."""

from __future__ import annotations

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.losses._clip import clipped
from pipeline.objectives.losses._inputs import Inputs


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); with dual clip at most -A dual_clip where A < 0.

    arXiv 1707.06347, equation 7; a separate upper range and dual clip: DAPO, 2503.14476, section 3.1 (0.2, 0.28, 10;
    public code read). Defaults: 0.2, 0.2, no dual clip.
    """
    ratio, advantages = inputs.ratio, inputs.advantages
    high = (ratio > 1 + objective.clip_high) & (advantages > 0)
    low = (ratio < 1 - objective.clip_low) & (advantages < 0)
    return clipped(ratio, advantages, objective), high | low
