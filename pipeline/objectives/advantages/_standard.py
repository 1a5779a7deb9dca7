"""Rewards in units of their standard deviation, which several advantages share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-4  # added to the standard deviation


def standardised(rewards: np.ndarray) -> np.ndarray:
    """Float64 ``[G]``: centred, in units of the standard deviation."""
    if uniform(rewards):
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)


def uniform(rewards: np.ndarray) -> bool:
    """Whether there is nothing to compare: fewer than two rewards, or all equal."""
    return len(rewards) < 2 or bool((rewards == rewards[0]).all())


def over_the_step(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rewards of all groups standardised together, cut into groups again."""
    if not groups:
        return []
    ends = np.cumsum([len(group) for group in groups])
    return np.split(standardised(np.concatenate(groups)), ends[:-1])
