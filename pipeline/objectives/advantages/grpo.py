"""GRPO: rewards standardised within their group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import advantage_method
from pipeline.objectives.advantages._standard import standardised

METHOD = advantage_method("grpo", "2402.03300", "A = (r - mean) / std of the group; PPO's clipped loss")


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """A_i = (r_i - mean) / (std + 1e-4), over the group (arXiv 2402.03300, section 4.1.2; public code read).

    The standard deviation is the unbiased one (n - 1), as most public code has it; the paper leaves the choice open. A
    group whose rewards are all equal, or of a single sample, gives exactly 0.
    """
    return [standardised(group) for group in groups]
