"""REINFORCE++: normalised over the whole step instead of within each group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import advantage_method
from pipeline.objectives.advantages._standard import over_the_step

METHOD = advantage_method("reinforce_pp", "2501.03262", "A = (r - mean) / std over the whole step")


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """A_i = (r_i - mean) / (std + 1e-4) over all samples of the step (arXiv 2501.03262, section 3; public code read).

    Over samples, each once; some public code takes the mean and the deviation over tokens, which counts long samples
    more.
    """
    return over_the_step(groups)
