"""``scope``: SCOPE-RL's own law (arXiv 2510.08141 v7): temperature follows the distance to the target, without memory.

T = clip(1 + (H* - H), 0.8, 1.2). Read: a secondary summary of v7, and one public port.
"""

from __future__ import annotations

import math

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits, temperatures
from pipeline.entropy.law import ANY, Course, Law, Loop, published_loop
from pipeline.methods import controller_method

MADE_FOR = temperatures()
METHOD = controller_method(
    "scope",
    "2510.08141 v7",
    "correct samples of a second rollout at T = clip(1 + H0 - H, .8, 1.2), over all drawn",
    "summary",
    "entropy.actuator=resample",
    "entropy.positive_mean=samples",
)
LIMITS = (0.8, 1.2)  # temperatures, as published


class ScopeLaw(Law):
    """T = clip(1 + (H* - H), lower, upper), H in nats; returned as ln T.

    Read from a secondary summary of v7 and one public port. Proportional only: it settles below the target by the drift
    divided by its gain.
    """

    def __init__(self, lower: float, upper: float) -> None:
        self._lower, self._upper = lower, upper

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        return math.log(min(max(1 + (goal - entropy), self._lower), self._upper))

    def forget(self) -> None:
        """See ``Law``; nothing is remembered."""


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law within the configured limits, or the published ones."""
    limits = command_limits(config, LIMITS)
    return published_loop(ScopeLaw(*limits), limits)
