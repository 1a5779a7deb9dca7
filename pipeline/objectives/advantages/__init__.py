"""From the rewards of a step's groups to advantages: ``objective.advantage`` names one of ``ADVANTAGES``.

An advantage function is given the rewards of every group of the step, each float64 ``[G]`` (samples drawn for one prompt), and
answers with as many arrays of the same lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.advantages import dr_grpo, grpo, pass_at_k, reinforce_pp, rloo

Advantage = Callable[[Sequence[np.ndarray], ObjectiveConfig], list[np.ndarray]]

ADVANTAGES: dict[str, Advantage] = {
    "grpo": grpo.advantages,
    "dr_grpo": dr_grpo.advantages,
    "rloo": rloo.advantages,
    "reinforce_pp": reinforce_pp.advantages,
    "reinforce_pp_baseline": reinforce_pp.baseline_advantages,
    "pass_at_k": pass_at_k.advantages,
}


def group_advantages(rewards: Sequence[np.ndarray], objective: ObjectiveConfig) -> list[np.ndarray]:
    """The advantage of each sample, float32 ``[G]`` per group.

    A step whose rewards are all equal teaches nothing, whatever the kind: exactly 0. Raises ``ValueError`` on an unknown kind.
    """
    if objective.advantage not in ADVANTAGES:
        raise ValueError(f"objective.advantage={objective.advantage!r}: use one of {', '.join(ADVANTAGES)}")
    groups = [np.asarray(group, np.float64) for group in rewards]
    return [group.astype(np.float32) for group in ADVANTAGES[objective.advantage](groups, objective)]
