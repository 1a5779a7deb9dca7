"""REINFORCE++ with a baseline: rewards centred within their group, then normalised over the whole step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import advantage_method
from pipeline.objectives.advantages import dr_grpo
from pipeline.objectives.advantages._standard import over_the_step

METHOD = advantage_method(
    "reinforce_pp_baseline", "2501.03262", "A = (r - mean of the group) / std over the whole step"
)


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """A_i as in ``reinforce_pp`` of r_i - mean of the group: the paper's variant for several samples a prompt (arXiv
    2501.03262).
    """
    return over_the_step(dr_grpo.advantages(groups, correct, objective))
