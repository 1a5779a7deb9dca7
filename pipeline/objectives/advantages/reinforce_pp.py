"""REINFORCE++: normalised over the whole step instead of within each group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.advantages import dr_grpo
from pipeline.objectives.advantages.grpo import standardised


def advantages(groups: Sequence[np.ndarray], objective: ObjectiveConfig) -> list[np.ndarray]:
    """A_i = (r_i - mean) / (std + 1e-4) over all samples of the step (arXiv 2501.03262, section 3; public code read).

    Over samples, each once; some public code takes the mean and the deviation over tokens, which counts long samples more.
    """
    return _over_the_step(groups)


def baseline_advantages(groups: Sequence[np.ndarray], objective: ObjectiveConfig) -> list[np.ndarray]:
    """The paper's variant for several samples a prompt: r_i - mean of the group, then the same over the step."""
    return _over_the_step(dr_grpo.advantages(groups, objective))


def _over_the_step(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    if not groups:
        return []
    ends = np.cumsum([len(group) for group in groups])
    return np.split(standardised(np.concatenate(groups)), ends[:-1])
