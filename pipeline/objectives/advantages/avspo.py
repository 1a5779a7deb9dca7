"""AVSPO: virtual samples give a group of equal rewards something to be compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import advantage_method
from pipeline.objectives.advantages._standard import standardised, uniform

METHOD = advantage_method(
    "avspo", "2605.21125", "GRPO's, of a group of equal rewards with a virtual sample beside it: right +, wrong -"
)
LEAST = 0.1  # the largest virtual reward beside samples of reward 0


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """GRPO's advantage, of a group of equal rewards together with virtual ones that no token is trained for.

    arXiv 2605.21125; paper and public code read, and they differ:

    - ``variant`` ``paper``: K (``virtual``) rewards r (1 - k / (K + 1)), k = 1..K, beside a group of equal rewards r
      above 0, and 0.1 (K - k + 1) / K beside one of zeros.
    - ``code``: one reward, 1 - r, and only in a step in which all rewards of all groups are 0 or all are 1.

    So the samples of a group that is all right get an advantage above 0, those of one that is all wrong one below 0.
    Default: the paper's variant with K = 1; the published K is not known to us.
    """
    step = np.concatenate([np.empty(0), *groups])
    same = len(step) > 0 and step[0] in (0, 1) and bool((step == step[0]).all())
    if objective.avspo.variant == "code":
        return [
            _beside(group, np.array([1 - group[0]])) if same and len(group) else standardised(group) for group in groups
        ]
    return [
        _beside(group, _virtual(group[0], objective.avspo.virtual))
        if len(group) and uniform(group)
        else standardised(group)
        for group in groups
    ]


def _virtual(reward: float, count: int) -> np.ndarray:
    """The paper's virtual rewards, ``[count]``."""
    k = np.arange(1, count + 1)
    return reward * (1 - k / (count + 1)) if reward > 0 else LEAST * (count - k + 1) / count


def _beside(group: np.ndarray, virtual: np.ndarray) -> np.ndarray:
    """The advantages of the group's own samples."""
    return standardised(np.concatenate([group, virtual]))[: len(group)]
