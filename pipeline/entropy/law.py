"""What a control law must answer. The guards around it are in ``closed_loop``."""

from __future__ import annotations

import math
from typing import Any, Protocol

Edges = tuple[float, float]
ANY: Edges = (0.0, math.inf)


class Law(Protocol):
    """From entropy and set-point to a command ``u`` (see ``actuators``), asked only when the reading can be trusted."""

    def propose(self, entropy: float, goal: float, last: float, staleness: int, edges: Edges = ANY) -> float:
        """The next ``u``, within the limits.

        Args:
            entropy: filtered, nats per token, above 0.
            goal: set-point, nats per token.
            last: the ``u`` in force.
            staleness: updates between the weights that drew the rows and those that measured them.
            edges: of the band, nats per token; most laws steer to ``goal`` alone.
        """

    def forget(self) -> None:
        """Drop the memory of having pushed entropy up: it is exploding."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
