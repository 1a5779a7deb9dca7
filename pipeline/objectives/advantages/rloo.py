"""RLOO: each sample against the mean of the others of its group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import advantage_method
from pipeline.objectives.advantages import dr_grpo

METHOD = advantage_method("rloo", "2402.14740", "A = r - mean of the others of the group")


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """A_i = r_i - mean of r_j over j != i (arXiv 2402.14740, section 2.2; public code read).

    This is Dr. GRPO's times G / (G - 1). A single sample has no others: 0.
    """
    centred = dr_grpo.advantages(groups, correct, objective)
    return [each * len(each) / max(1, len(each) - 1) for each in centred]
