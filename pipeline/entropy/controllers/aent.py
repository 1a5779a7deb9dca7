"""``aent``: AEnt's adaptive entropy coefficient (arXiv 2509.03493; public code read).

Keys: ``entropy.aent.rate``, the change per nat outside the band, and ``entropy.aent.least`` and ``most``, the box.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits
from pipeline.entropy.law import ANY, Course, Law, Loop, published_loop
from pipeline.methods import controller_method

MADE_FOR = ("entropy_bonus",)
METHOD = controller_method(
    "aent",
    "2509.03493",
    "beta held in [1e-5, .01] by the distance of H to the band; here of the whole entropy, not of "
    "the likeliest 80 % of the vocabulary",
    "code",
    "entropy.actuator=entropy_bonus",
)


class AentLaw(Law):
    """beta <- clip(beta - lr (min(0, H - low) + max(0, H - high)), least, most): still while H lies in the band.

    For the actuator ``entropy_bonus``. Published: band [0.1, 0.5], lr = 1e-3, box [1e-5, 0.01]. Only the coefficient is
    AEnt's here: its bonus, and its reading, are the entropy clamped to the likeliest 1 - p of the vocabulary (p = 0.2),
    which the learner's kernel does not compute: the vocabulary is divided over tensor-parallel ranks, and which columns
    are its likeliest share is known to none of them. Bonus and reading are the full entropy. The public code begins to
    move beta after some steps (29 in its example), this law at the first.
    """

    STATE: ClassVar = {"coefficient": float}

    def __init__(self, rate: float, least: float, most: float) -> None:
        self._rate, self._least, self._most = rate, least, most
        self.coefficient = least

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        outside = min(0.0, entropy - course.low) + max(0.0, entropy - course.high)
        self.coefficient = min(max(self.coefficient - self._rate * outside, self._least), self._most)
        return self.coefficient

    def forget(self) -> None:
        """See ``Law``."""
        self.coefficient = self._least


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law up to the configured limit, or ``entropy.aent.most``."""
    limits = command_limits(config, (0.0, config.aent.most))
    return published_loop(AentLaw(config.aent.rate, config.aent.least, limits[1]), limits)
