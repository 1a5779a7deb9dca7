"""Skywork-OR1's adaptive entropy coefficient (arXiv 2505.22312; public code read)."""

from __future__ import annotations

from pipeline.entropy.law import ANY, Edges, Law


class SkyworkLaw(Law):
    """beta <- clip(beta + D if H < H* else beta - D, 0, beta_max); the bonus is on, with that beta, only while H < H*.

    For the actuator ``entropy_bonus``. Published: H* = 0.2, D = 1e-4, beta_max = 0.005, beta_0 = 0. A two-point law on a
    coefficient that integrates, so the entropy, which integrates it again, swings around the target.
    """

    STATE = ("coefficient",)

    def __init__(self, step: float, upper: float) -> None:
        self._step, self._upper = step, upper
        self.coefficient = 0.0

    def propose(self, entropy: float, goal: float, last: float, staleness: int, edges: Edges = ANY) -> float:
        """See ``Law``."""
        below = entropy < goal
        moved = self.coefficient + (self._step if below else -self._step)
        self.coefficient = min(max(moved, 0.0), self._upper)
        return self.coefficient if below else 0.0

    def forget(self) -> None:
        """See ``Law``."""
        self.coefficient = 0.0
