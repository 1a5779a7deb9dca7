"""EntroPIC's proportional-integral coefficient (arXiv 2511.15248; its README and configuration read)."""

from __future__ import annotations

from pipeline.entropy.law import ANY, Edges, Law

LIMITS = (-1.0, 1.0)


class EntropicLaw(Law):
    """u = clip(Kp (H* - H) + Ki sum of the errors before this one, -1, 1), H in nats.

    For the actuator ``high_prob``; the paper's coefficient is -u. Published: Kp = 1, Ki = 0.01. As there, nothing keeps the sum from
    growing at a limit.
    """

    STATE = ("total",)

    def __init__(self, kp: float, ki: float, lower: float, upper: float) -> None:
        self._kp, self._ki, self._lower, self._upper = kp, ki, lower, upper
        self.total = 0.0

    def propose(self, entropy: float, goal: float, last: float, staleness: int, edges: Edges = ANY) -> float:
        """See ``Law``."""
        error = goal - entropy
        wanted = self._kp * error + self._ki * self.total
        self.total += error
        return min(max(wanted, self._lower), self._upper)

    def forget(self) -> None:
        """See ``Law``."""
        self.total = min(self.total, 0.0)
