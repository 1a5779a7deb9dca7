"""What HTPO leaves out and what it bounds otherwise; the bounds are in ``losses.htpo``."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.objectives.losses.htpo import HARD_CORRECT, WRONG
from pipeline.objectives.shaping.tokens import Tokens


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Split each response into its ``high_entropy`` share of tokens and the rest, and prompts at accuracy ``difficulty``.

    arXiv 2605.08283 (public code read):

    - hard prompt, correct: the share ``skip_low`` of the low-entropy tokens that is lowest gets weight 0; high-entropy ones are
      marked ``HARD_CORRECT``;
    - easy prompt, correct: the share ``skip_high`` of the high-entropy tokens that is highest gets weight 0;
    - wrong: high-entropy tokens are marked ``WRONG``.

    Shares are per response, of at least one token (of ``skip_low``, as in that code, the tokens strictly below the last of the share).
    A prompt is hard below the accuracy ``difficulty``. Defaults: 0.2, 0.6, 0.006, 0.02. Entropies are those before the first update.
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
