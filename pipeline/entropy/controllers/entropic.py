"""``entropic``: EntroPIC's proportional-integral coefficient (arXiv 2511.15248; its README and configuration read).

Keys: ``entropy.entropic.kp`` per nat of error, and ``entropy.entropic.ki`` per nat of error and step.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits
from pipeline.entropy.law import ANY, Course, Law, Loop, published_loop
from pipeline.methods import controller_method

MADE_FOR = ("high_prob",)
METHOD = controller_method(
    "entropic",
    "2511.15248",
    "PI coefficient in [-1, 1] of -r|A| on tokens with pi > .95",
    "summary",
    "entropy.actuator=high_prob",
)
LIMITS = (-1.0, 1.0)  # as published


class EntropicLaw(Law):
    """u = clip(Kp (H* - H) + Ki sum of the errors before this one, -1, 1), H in nats.

    For the actuator ``high_prob``; the paper's coefficient is -u. Published: Kp = 1, Ki = 0.01. As there, nothing keeps
    the sum from growing at a limit.
    """

    STATE: ClassVar = {"total": float}

    def __init__(self, kp: float, ki: float, lower: float, upper: float) -> None:
        self._kp, self._ki, self._lower, self._upper = kp, ki, lower, upper
        self.total = 0.0

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        error = goal - entropy
        wanted = self._kp * error + self._ki * self.total
        self.total += error
        return min(max(wanted, self._lower), self._upper)

    def forget(self) -> None:
        """See ``Law``."""
        self.total = min(self.total, 0.0)


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law within the configured limits, or the published ones."""
    limits = command_limits(config, LIMITS)
    return published_loop(EntropicLaw(config.entropic.kp, config.entropic.ki, *limits), limits)
