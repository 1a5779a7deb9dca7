"""MCPO's advantage: the better a prompt is mastered, the less the standard deviation shrinks its weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.advantages._standard import standardised


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """A_i = (r_i - mean) / ((std + 1e-4) scale(p)), with p the share of correct samples in the group.

    scale(p) is 1 up to p = 0.5, then 2 sqrt(p (1 - p)) (arXiv 2604.16972, from a note with the equations). With rewards
    of 0 and 1 the advantage beyond 0.5 is that of a division by the variance. At p = 1 it is exactly 0, penalised
    lengths included: there the loss ``mcpo`` holds the policy instead.
    """
    return [_scaled(standardised(group), marks) for group, marks in zip(groups, correct, strict=True)]


def _scaled(advantages: np.ndarray, correct: np.ndarray) -> np.ndarray:
    share = correct.mean() if len(correct) else 0.0
    if share == 1:
        return np.zeros(len(advantages))
    return advantages / (1.0 if share <= 0.5 else 2 * np.sqrt(share * (1 - share)))
