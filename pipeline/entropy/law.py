"""What a control law must answer, and what a controller's file builds.

The guards around a law are in ``closed_loop``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from pipeline.entropy.band import SetPoint
from pipeline.entropy.sensor import Sensor
from pipeline.entropy.state import Stateful
from pipeline.entropy.watch import STANDSTILL


@dataclass(frozen=True)
class Course:
    """The band at a step, nats per token, and where its target goes from there: ``slope`` of ln H* per step."""

    low: float = 0.0
    high: float = math.inf
    slope: float = 0.0


ANY = Course()


class Law(Stateful, ABC):
    """From entropy and set-point to a command ``u`` (see ``actuator``), asked only when the reading can be trusted."""

    @property
    def gain(self) -> float:
        """Of ln H per unit of ``u`` and step, as learnt so far; NaN: this law learns none."""
        return math.nan

    @property
    def standstill(self) -> float:
        """Of ln H per step toward the target, below which a command at its limit does not get there."""
        return STANDSTILL

    def expected(self, u: float) -> float:
        """Of ln H per step under the command ``u``, as learnt so far; NaN: this law learns none."""
        return math.nan

    @abstractmethod
    def propose(self, entropy: float, goal: float, last: float, staleness: float, course: Course = ANY) -> float:
        """The next ``u``, within the limits.

        Args:
            entropy: filtered, nats per token, above 0.
            goal: set-point, nats per token.
            last: the ``u`` in force.
            staleness: updates between the command and the training on what it drew, as measured: the mean over rows.
            course: of the band; most laws steer to ``goal`` alone.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop the memory of having pushed entropy up: it is exploding."""


@dataclass(frozen=True)
class Loop:
    """A law that closes the loop, and what it is run with.

    ``limits`` are those of the command; the actuator's rest lies between them. ``sensor`` is what the law gets to see
    of the readings, ``set_point`` where it is steered on the way to the band's target.
    """

    law: Law
    limits: tuple[float, float]
    sensor: Sensor
    set_point: SetPoint


@dataclass(frozen=True)
class Hold:
    """No loop: a command that no reading changes, with the state and the reason that every step reports."""

    command: float
    state: str
    reason: str


def published_loop(law: Law, limits: tuple[float, float]) -> Loop:
    """A published law as published: it sees every reading as it is, and is steered to the target at once."""
    return Loop(law, limits, Sensor(), SetPoint(0.0))
