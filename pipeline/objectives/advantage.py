"""From the rewards of a step's groups to advantages: ``objective.advantage`` names a file of ``advantages``.

An advantage function is given the rewards of every group of the step, each float64 ``[G]`` (samples drawn for one
prompt, penalties taken off), and which samples are correct, each bool ``[G]``. It answers with as many arrays of the
same lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.registry import load


def group_advantages(
    rewards: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """The advantage of each sample, float32 ``[G]`` per group.

    A step whose rewards are all equal teaches nothing, whatever the kind but ``avspo``: exactly 0. Raises
    ``ValueError`` on an unknown kind.
    """
    advantages = load("pipeline.objectives.advantages", objective.advantage).advantages
    groups = [np.asarray(group, np.float64) for group in rewards]
    return [group.astype(np.float32) for group in advantages(groups, correct, objective)]
