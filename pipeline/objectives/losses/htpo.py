"""HTPO: other bounds for high-entropy tokens, by the prompt's difficulty and the response's correctness."""

from __future__ import annotations

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.losses import ppo
from pipeline.objectives.losses.inputs import Inputs

HARD_CORRECT = 1  # marks of high-entropy tokens: of correct responses to hard prompts,
WRONG = 2  # and of wrong ones


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, but for marked tokens beyond the clip range (arXiv 2605.08283; public code read).

    With 1 for exp(log pi - sg(log pi)), marked tokens lose -A r, and outside the range:

    - ``HARD_CORRECT``, r > 1 + clip_high: +(1 + clip_high) A 1, which pulls the token back down;
      r < 1 - clip_low: +A 1 / sg(r);
    - ``WRONG``, r < 1 - clip_low: +(1 - clip_low) A 1, which pulls the token back up (A < 0).

    The signs are those of the published code. Dual clip as in PPO. ``shaping.htpo`` sets the marks, and takes out the tokens that
    the method leaves out altogether.
    """
    ratio, advantages = inputs.ratio, inputs.advantages
    loss, bounded = ppo.surrogate(inputs, objective)
    below, above = ratio < 1 - objective.clip_low, ratio > 1 + objective.clip_high
    hard, wrong = inputs.marked(HARD_CORRECT), inputs.marked(WRONG)
    loss = torch.where(hard | wrong, ppo.dual_clip(-advantages * ratio, advantages, objective), loss)
    pulled = advantages * inputs.identity
    loss = torch.where(hard & above, (1 + objective.clip_high) * pulled, loss)
    loss = torch.where(hard & below, pulled / ratio.detach(), loss)
    loss = torch.where(wrong & below, (1 - objective.clip_low) * pulled, loss)
    return loss, torch.where(hard | wrong, (hard & (above | below)) | (wrong & below), bounded)
