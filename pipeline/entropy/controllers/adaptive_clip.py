"""``adaptive_clip``: MAI-Thinking-1's adaptive clipping: the upper clip range steps up below the target, down above it.

Read: somebody else's public code (MILES), which names the report's section 3.1.1.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits
from pipeline.entropy.law import ANY, Course, Law, Loop, published_loop
from pipeline.methods import OFF_POLICY_STEP, controller_method

MADE_FOR = ("clip_high",)
METHOD = controller_method(
    "adaptive_clip",
    "MAI-Thinking-1",
    "ratios in [.4, 2.5 + k], k +-.25 a step toward the target, in [0, 2.5]; ADAPO's idea",
    "third-party code",
    "entropy.actuator=clip_high",
    "objective.clip_low=0.6",
    "objective.clip_high=1.5",
    OFF_POLICY_STEP,
)
STEP, MOST = 0.25, 2.5  # of k, as published


class AdaptiveClipLaw(Law):
    """k <- clip(k + 0.25 sign(H* - H), 0, 2.5): ratios are clipped to [1 - eps, 1 / (1 - eps) + k].

    For the actuator ``clip_high``. Published: H* = 0.3, eps = 0.6 (so ``objective.clip_low`` 0.6 and ``clip_high``
    1.5), k_0 = 0. The published entropy is an estimate of importance-weighted log-probabilities, taken after every
    optimizer step; here it is the exact one of the step's rows, once a step. ADAPO (arXiv 2603.11682) moves the same
    bound in the same direction by steps that are not known to us.
    """

    STATE: ClassVar = {"coefficient": float}

    def __init__(self, upper: float) -> None:
        self._upper = upper
        self.coefficient = 0.0

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        toward = (entropy < goal) - (entropy > goal)
        self.coefficient = min(max(self.coefficient + STEP * toward, 0.0), self._upper)
        return self.coefficient

    def forget(self) -> None:
        """See ``Law``."""
        self.coefficient = 0.0


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law up to the configured limit, or the published one."""
    limits = command_limits(config, (0.0, MOST))
    return published_loop(AdaptiveClipLaw(limits[1]), limits)
