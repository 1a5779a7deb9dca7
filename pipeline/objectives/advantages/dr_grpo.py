"""Dr. GRPO: rewards centred within their group, without the division that favours easy and hard prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import advantage_method
from pipeline.objectives.advantages._standard import uniform

METHOD = advantage_method(
    "dr_grpo", "2503.20783", "A = r - mean of the group; sum / max_new_tokens", "objective.aggregation=dr_grpo"
)


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """A_i = r_i - mean of the group (arXiv 2503.20783, section 3.2; public code read). Groups of equal rewards give
    exactly 0.
    """
    return [np.zeros(len(group)) if uniform(group) else group - group.mean() for group in groups]
