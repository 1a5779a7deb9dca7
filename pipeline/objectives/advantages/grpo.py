"""GRPO: rewards standardised within their group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig

EPSILON = 1e-4  # added to the standard deviation


def advantages(groups: Sequence[np.ndarray], objective: ObjectiveConfig) -> list[np.ndarray]:
    """A_i = (r_i - mean) / (std + 1e-4), over the group (arXiv 2402.03300, section 4.1.2; public code read).

    The standard deviation is the unbiased one (n - 1), as most public code has it; the paper leaves the choice open. A group
    whose rewards are all equal, or of a single sample, gives exactly 0.
    """
    return [standardised(group) for group in groups]


def standardised(rewards: np.ndarray) -> np.ndarray:
    """Float64 ``[G]``: centred, in units of the standard deviation."""
    if uniform(rewards):
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)


def uniform(rewards: np.ndarray) -> bool:
    """Whether there is nothing to compare: fewer than two rewards, or all equal."""
    return len(rewards) < 2 or bool((rewards == rewards[0]).all())
