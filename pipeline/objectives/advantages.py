"""Group-relative advantages."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-4  # added to the standard deviation


def group_advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """The advantage of each sample of one group, float32 ``[G]``.

    Args:
        rewards: float ``[G]``, of samples drawn for the same prompt.
        kind: ``grpo``: (r - mean) / (std + 1e-4), with the unbiased standard deviation (n - 1), as most public code has
            it (arXiv 2402.03300 leaves the choice open); ``dr_grpo``: r - mean (2503.20783).

    A group whose rewards are all equal, or of a single sample, teaches nothing: exactly 0.
    """
    if kind not in ("grpo", "dr_grpo"):
        raise ValueError(f"objective.advantage={kind!r}: use grpo or dr_grpo")
    rewards = np.asarray(rewards, np.float64)
    if len(rewards) < 2 or (rewards == rewards[0]).all():
        return np.zeros(len(rewards), np.float32)
    centred = rewards - rewards.mean()
    if kind == "grpo":
        centred /= rewards.std(ddof=1) + EPSILON
    return centred.astype(np.float32)
