"""GSPO: one ratio per sequence."""

from __future__ import annotations

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import loss_method
from pipeline.objectives.losses._clip import clipped
from pipeline.objectives.losses._inputs import Inputs, ratio_of

METHOD = loss_method(
    "gspo",
    "2507.18071",
    "ratio of the whole sequence (geometric mean over tokens), clipped at 3e-4, 4e-4; mean of sequences",
    "objective.aggregation=sequence_mean",
    "objective.clip_low=3e-4",
    "objective.clip_high=4e-4",
)


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate of s = exp(mean over the sequence of log r), shared by its tokens.

    arXiv 2507.18071, equations 5 to 7, in the form of equation 14 (GSPO-token: each token's own gradient, the
    sequence's value), which has the same gradient for an advantage that belongs to the sequence (public code read).
    The paper clips at 3e-4 and 4e-4 and takes the mean of sequences: ``aggregation=sequence_mean``.
    """
    log_ratio = (inputs.log_probs - inputs.old).detach()
    _, index, lengths = inputs.row.unique(return_inverse=True, return_counts=True)
    means = log_ratio.new_zeros(len(lengths)).index_add(0, index, log_ratio) / lengths
    ratio = ratio_of(means)[index] * inputs.identity
    high = (ratio > 1 + objective.clip_high) & (inputs.advantages > 0)
    low = (ratio < 1 - objective.clip_low) & (inputs.advantages < 0)
    return clipped(ratio, inputs.advantages, objective), high | low
