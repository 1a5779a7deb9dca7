"""SCOPE-RL's own law (arXiv 2510.08141 v7): temperature follows the distance to the target, without memory."""

from __future__ import annotations

import math

from pipeline.entropy.law import ANY, Edges, Law

LIMITS = (0.8, 1.2)  # temperatures, as published


class ScopeLaw(Law):
    """T = clip(1 + (H* - H), lower, upper), H in nats; returned as ln T.

    Read from a secondary summary of v7 and one public port. Proportional only: it settles below the target by the drift
    divided by its gain.
    """

    def __init__(self, lower: float = LIMITS[0], upper: float = LIMITS[1]) -> None:
        self._lower, self._upper = lower, upper

    def propose(self, entropy: float, goal: float, last: float, staleness: int, edges: Edges = ANY) -> float:
        """See ``Law``."""
        return math.log(min(max(1 + (goal - entropy), self._lower), self._upper))

    def forget(self) -> None:
        """See ``Law``; nothing is remembered."""
