"""80/20: the policy gradient of forking tokens only."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens

METHOD = shaping_method(
    "high_entropy_tokens", "2506.01939", "loss on the 20 % of tokens of highest entropy only", shaping="high_entropy"
)


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """Weight 0 on tokens whose entropy lies below the (1 - fraction) quantile of the step (arXiv 2506.01939, equation
    6).

    Public code read. The fraction, 0.2 by default, is that of highest entropy; tokens equal to the last of them stay
    too. As in the paper the denominator remains that of all tokens.
    """
    count = max(1, int(config.objective.high_entropy.fraction * len(tokens.entropy)))
    threshold = tokens.entropy.sort(descending=True).values[count - 1]
    return replace(tokens, scale=tokens.scale * (tokens.entropy >= threshold))
