"""``repo_r``: REPO-R's law (arXiv 2603.11682; a public example read): a coefficient that doubles or halves."""

from __future__ import annotations

from typing import ClassVar

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits
from pipeline.entropy.law import ANY, Course, Law, Loop, published_loop
from pipeline.methods import controller_method

MADE_FOR = ("surprisal",)
METHOD = controller_method(
    "repo_r",
    "2603.11682",
    "A x max(0, 1 - z sign(A) log pi); |z| in [1e-4, .05] doubles toward the target, or halves and then turns",
    "code",
    "entropy.actuator=surprisal",
)
LEAST, MOST = 1e-4, 0.05  # |z|, as published


class RepoRLaw(Law):
    """z pushes up while z > 0. Pushing toward the target z doubles, else it halves; at 1e-4 its sign turns instead.

    For the actuator ``surprisal``. Published: |z| in [1e-4, 0.05]. Unknown, and chosen by us: z starts at 1e-4.
    """

    STATE: ClassVar = {"coefficient": float}

    def __init__(self, lower: float, upper: float) -> None:
        self._lower, self._upper = lower, upper
        self.coefficient = LEAST

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        toward = 1.0 if entropy < goal else -1.0
        if self.coefficient * toward > 0:
            self.coefficient *= 2
        elif abs(self.coefficient) / 2 >= LEAST:
            self.coefficient /= 2
        else:
            self.coefficient = toward * LEAST
        least, most = min(self._lower, -LEAST), max(self._upper, LEAST)  # |z| keeps its least size beyond a limit of 0
        self.coefficient = min(max(self.coefficient, least), most)
        return min(max(self.coefficient, self._lower), self._upper)

    def forget(self) -> None:
        """See ``Law``."""
        self.coefficient = -LEAST


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law within the configured limits, or the published ones."""
    limits = command_limits(config, (-MOST, MOST))
    return published_loop(RepoRLaw(*limits), limits)
