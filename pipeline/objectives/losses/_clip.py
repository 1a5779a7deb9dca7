"""The clip range of PPO and its dual clip, which other losses share."""

from __future__ import annotations

import torch

from pipeline.config.schema import ObjectiveConfig


def clipped(ratio: torch.Tensor, advantages: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), with dual clip, of any ratio ``[n]``."""
    bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    return dual_clip(torch.maximum(-advantages * ratio, -advantages * bounded), advantages, objective)


def dual_clip(loss: torch.Tensor, advantages: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """At most ``-A dual_clip`` where A < 0; unchanged where dual clip is off."""
    if objective.dual_clip > 0:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * objective.dual_clip), loss)
    return loss
