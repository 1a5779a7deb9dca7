"""HTPO: other bounds for high-entropy tokens, by the prompt's difficulty and the response's correctness."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import ObjectiveConfig, RunConfig
from pipeline.methods import CLIP_HIGHER, loss_method
from pipeline.objectives.losses import ppo
from pipeline.objectives.losses._clip import dual_clip
from pipeline.objectives.losses._inputs import Inputs
from pipeline.objectives.tokens import Tokens

METHOD = loss_method(
    "htpo",
    "2605.08283",
    "by difficulty, correctness and entropy: tokens left out, or pulled back beyond the range",
    *CLIP_HIGHER,
)

HARD_CORRECT = 1  # marks of high-entropy tokens: of correct responses to hard prompts,
WRONG = 2  # and of wrong ones


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, but for marked tokens beyond the clip range (arXiv 2605.08283; public code read).

    With 1 for exp(log pi - sg(log pi)), marked tokens lose -A r, and outside the range:

    - ``HARD_CORRECT``, r > 1 + clip_high: +(1 + clip_high) A 1, which pulls the token back down;
      r < 1 - clip_low: +A 1 / sg(r);
    - ``WRONG``, r < 1 - clip_low: +(1 - clip_low) A 1, which pulls the token back up (A < 0).

    The signs are those of the published code. Dual clip as in PPO. ``mark`` sets the marks, and takes out the tokens
    that the method leaves out altogether.
    """
    ratio, advantages = inputs.ratio, inputs.advantages
    loss, bounded = ppo.surrogate(inputs, objective)
    below, above = ratio < 1 - objective.clip_low, ratio > 1 + objective.clip_high
    hard, wrong = inputs.marked(HARD_CORRECT), inputs.marked(WRONG)
    loss = torch.where(hard | wrong, dual_clip(-advantages * ratio, advantages, objective), loss)
    pulled = advantages * inputs.identity
    loss = torch.where(hard & above, (1 + objective.clip_high) * pulled, loss)
    loss = torch.where(hard & below, pulled / ratio.detach(), loss)
    loss = torch.where(wrong & below, (1 - objective.clip_low) * pulled, loss)
    return loss, torch.where(hard | wrong, (hard & (above | below)) | (wrong & below), bounded)


def mark(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Split each response into its ``high_entropy`` share of tokens and the rest, and prompts at accuracy
    ``difficulty``.

    arXiv 2605.08283 (public code read):

    - hard prompt, correct: the share ``skip_low`` of the low-entropy tokens that is lowest gets weight 0; high-entropy
      ones are marked ``HARD_CORRECT``;
    - easy prompt, correct: the share ``skip_high`` of the high-entropy tokens that is highest gets weight 0;
    - wrong: high-entropy tokens are marked ``WRONG``.

    Shares are per response, of at least one token (of ``skip_low``, as in that code, the tokens strictly below the
    last of the share). A prompt is hard below the accuracy ``difficulty``. Defaults: 0.2, 0.6, 0.006, 0.02. Entropies
    are those before the first update.
    """
    parameters = config.objective.htpo
    scale, marks = tokens.scale.clone(), torch.zeros(len(tokens.row), dtype=torch.uint8)
    for index in _responses(tokens.row):
        entropy, right = tokens.entropy[index], bool(tokens.correct[index[0]])
        hard = float(tokens.accuracy[index[0]]) < parameters.difficulty
        order = entropy.sort(descending=True).values
        high = entropy >= order[max(int(parameters.high_entropy * len(order)), 1) - 1]
        if not right:
            marks[index[high]] = WRONG
        elif hard:
            marks[index[high]] = HARD_CORRECT
            low = entropy[~high].sort().values
            if len(low):
                last = low[max(int(parameters.skip_low * len(low)), 1) - 1]
                scale[index[~high & (entropy < last)]] = 0.0
        else:
            last = order[max(int(parameters.skip_high * int(high.sum())), 1) - 1]
            scale[index[high & (entropy >= last)]] = 0.0
    return replace(tokens, scale=scale, marks=marks)


def _responses(row: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Indices of the tokens of each response."""
    _, counts = row.unique_consecutive(return_counts=True)
    return torch.arange(len(row)).split(counts.tolist())
