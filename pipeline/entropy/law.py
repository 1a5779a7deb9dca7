"""What a control law must answer. The guards around it are in ``closed_loop``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from pipeline.entropy.state import Stateful

Edges = tuple[float, float]
ANY: Edges = (0.0, math.inf)


class Law(Stateful, ABC):
    """From entropy and set-point to a command ``u`` (see ``actuators``), asked only when the reading can be trusted."""

    @property
    def gain(self) -> float:
        """Of ln H per unit of ``u`` and step, as learnt so far; NaN: this law learns none."""
        return math.nan

    @abstractmethod
    def propose(self, entropy: float, goal: float, last: float, staleness: int, edges: Edges = ANY) -> float:
        """The next ``u``, within the limits.

        Args:
            entropy: filtered, nats per token, above 0.
            goal: set-point, nats per token.
            last: the ``u`` in force.
            staleness: updates between the weights that drew the rows and those that measured them.
            edges: of the band, nats per token; most laws steer to ``goal`` alone.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop the memory of having pushed entropy up: it is exploding."""
