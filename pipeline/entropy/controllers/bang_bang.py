"""``bang_bang``: AEPO's law (arXiv 2510.08141 v1 to v6): one of two temperatures.

T = 1.2 if H <= H* else 0.8. Read: the paper's public code.
"""

from __future__ import annotations

import math

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits, temperatures
from pipeline.entropy.law import ANY, Course, Law, Loop, published_loop
from pipeline.methods import controller_method

MADE_FOR = temperatures()
METHOD = controller_method(
    "aepo",
    "2510.08141 v1-v6",
    "the same at T = 1.2 or .8; positives (correct ones; the code's: A > .05) replace as many main rows",
    "code",
    "entropy.actuator=resample",
    "entropy.positive_mean=main",
    "entropy.auxiliary_replaces=true",
    controller="bang_bang",
)
LIMITS = (0.8, 1.2)  # temperatures, as published


class BangBangLaw(Law):
    """T = upper if H <= H* else lower (published: 1.2 and 0.8); returned as ln T.

    The published code's faults are not reproduced: it crashes when no positive is found, starts hot whatever the
    entropy, forgets its state in a checkpoint, reads the entropy from rows drawn at T too, and overwrites main rows
    with positives (here they are added, all in the one batch). It differs from this in three more things, which do not
    matter to the law: it divides by the tokens it trains on (here rows left out still count in the denominator), it
    halves the positives while cooling, and it takes for a positive what has an advantage above 0.05 (here what is
    correct).
    """

    def __init__(self, lower: float, upper: float) -> None:
        self._lower, self._upper = lower, upper

    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """See ``Law``."""
        return math.log(self._upper if entropy <= goal else self._lower)

    def forget(self) -> None:
        """See ``Law``; nothing is remembered."""


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law between the configured temperatures, or the published ones."""
    limits = command_limits(config, LIMITS)
    return published_loop(BangBangLaw(*limits), limits)
