"""``skywork``: Skywork-OR1's adaptive entropy coefficient (arXiv 2505.22312; public code read).

Keys: ``entropy.skywork.step``, the change per step, and ``entropy.skywork.upper``, the largest coefficient.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits
from pipeline.entropy.law import ANY, Course, Law, Loop, published_loop
from pipeline.methods import controller_method

MADE_FOR = ("entropy_bonus",)
METHOD = controller_method(
    "skywork",
    "Skywork-OR1",
    "beta += D if H < target else -D, in [0, .005]; bonus on while H < target",
    "code",
    "entropy.actuator=entropy_bonus",
)


class SkyworkLaw(Law):
    """beta <- clip(beta + D if H < H* else beta - D, 0, beta_max); the bonus is on, with that beta, only while H < H*.

    For the actuator ``entropy_bonus``. Published: H* = 0.2, D = 1e-4, beta_max = 0.005, beta_0 = 0. A two-point law on
    a coefficient that integrates, so the entropy, which integrates it again, swings around the target.
    """

    STATE: ClassVar = {"coefficient": float}

    def __init__(self, step: float, upper: float, start: float = 0.0) -> None:
        self._step, self._upper = step, upper
        self.coefficient = start

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        below = entropy < goal
        moved = self.coefficient + (self._step if below else -self._step)
        self.coefficient = min(max(moved, 0.0), self._upper)
        return self.coefficient if below else 0.0

    def forget(self) -> None:
        """See ``Law``."""
        self.coefficient = 0.0


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law up to the configured limit, or ``entropy.skywork.upper``."""
    limits = command_limits(config, (0.0, config.skywork.upper))
    return published_loop(SkyworkLaw(config.skywork.step, limits[1]), limits)
