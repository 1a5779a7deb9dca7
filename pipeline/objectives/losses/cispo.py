"""CISPO: a truncated importance weight instead of a clipped ratio; no token loses its gradient."""

from __future__ import annotations

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import loss_method
from pipeline.objectives.losses._inputs import Inputs

METHOD = loss_method(
    "cispo",
    "2506.13585",
    "-sg(min(r, 1.2)) A log pi: truncated weights, no token loses its gradient",
    "objective.clip_low=1",
    "objective.clip_high=0.2",
)


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi (MiniMax-M1, arXiv 2506.13585, equations 4 and 5; public code
    read).

    The paper puts no lower bound (``clip_low=1``) and tunes the upper one; a public script has 0.2. Bounded are the
    tokens whose weight was truncated.
    """
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    ratio = inputs.ratio.detach()
    loss = -ratio.clamp(low, high) * inputs.advantages * inputs.log_probs
    return loss, (ratio < low) | (ratio > high)
