"""AEPO's law (arXiv 2510.08141 v1 to v6): one of two temperatures."""

from __future__ import annotations

import math

from pipeline.entropy.law import ANY, Edges, Law


class BangBangLaw(Law):
    """T = upper if H <= H* else lower (published: 1.2 and 0.8); returned as ln T.

    The published code's faults are not reproduced: it crashes when no positive is found, starts hot whatever the entropy,
    forgets its state in a checkpoint, reads the entropy from rows drawn at T too, and overwrites main rows with positives
    (here they are added, all in the one batch).
    """

    def __init__(self, lower: float, upper: float) -> None:
        self._lower, self._upper = lower, upper

    def propose(self, entropy: float, goal: float, last: float, staleness: int, edges: Edges = ANY) -> float:
        """See ``Law``."""
        return math.log(self._upper if entropy <= goal else self._lower)

    def forget(self) -> None:
        """See ``Law``; nothing is remembered."""
