"""What an actuator's file says of it: how far its command goes, what it is at rest, and the first gain of the PI law.

Inside a controller a command is a number ``u`` in the actuator's own unit, 0 at rest: ln T for temperatures, the
coefficient or fraction itself for the others. At rest a coefficient or fraction does nothing; a positive term at T=1 is
still added with its weight ``entropy.alpha``, only its temperature no longer favours unlikely tokens over likely ones.
Limits and gains were measured on a 100k-parameter model with a target of 0.3 nats (docs/methods.md); they are starting
points for another, not laws.

A coefficient below 0 is refused unless the actuator is ``signed``: turned on incorrect samples it feeds back on itself
and collapses the policy, and on correct ones it only hastens what the policy gradient does anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.gains import integral_gain
from pipeline.registry import load, names

PACKAGE = "pipeline.entropy.actuators"


@dataclass(frozen=True)
class Actuator:
    """``lower``, ``upper`` and ``neutral`` are commands; ``kp`` is in units of ``u``. ``name`` is the file's."""

    name: str
    lower: float
    upper: float
    neutral: float  # the command at rest, before any reading: u = 0; for a temperature 1
    kp: float  # u per unit of ln H
    temperature: bool = False  # the command is a temperature, u = ln T
    second_rollout: bool = False  # draws auxiliary samples
    positive_term: bool = False  # scaled by ``entropy.alpha``: with alpha 0 it does nothing
    signed: bool = False  # the command may be below 0
    share: bool = False  # the command is a share of tokens, at most 1
    off_policy: bool = False  # does nothing while every ratio is 1
    statistics: bool = False  # chooses among all tokens of the step, for which the learner makes a forward pass

    @property
    def ki(self) -> float:
        """See ``PiLaw``."""
        return integral_gain(self.kp)

    def to_u(self, command: float) -> float:
        """From the actuator's unit to the controller's."""
        return math.log(command) if self.temperature else command

    def to_command(self, u: float) -> float:
        """From the controller's unit to the actuator's."""
        return math.exp(u) if self.temperature else u


def temperature(name: str, lower: float, upper: float, kp: float, second_rollout: bool = False) -> Actuator:
    """An actuator that adds a positive term at a temperature."""
    return Actuator(name, lower, upper, 1.0, kp, True, second_rollout, positive_term=True)


def actuator_called(name: str) -> Actuator:
    """The actuator of that name. Raises ``ValueError`` with the names there are when there is none."""
    actuator: Actuator = load(PACKAGE, name).ACTUATOR
    return actuator


def temperatures() -> tuple[str, ...]:
    """The actuators whose command is a temperature."""
    return tuple(name for name in names(PACKAGE) if actuator_called(name).temperature)


def actuator_of(config: EntropyConfig) -> Actuator:
    """The configured actuator."""
    return actuator_called(config.actuator)


def acting(config: EntropyConfig) -> Actuator | None:
    """The actuator that takes part in training; ``None`` for plain GRPO: no controller, or a positive term of weight
    0.
    """
    if config.controller == "none":
        return None
    actuator = actuator_of(config)
    return None if actuator.positive_term and config.alpha == 0 else actuator


def command_limits(config: EntropyConfig, default: tuple[float, float]) -> tuple[float, float]:
    """Limits of the command: those configured, and ``default``'s where a key is 0. ``entropy_rules`` checked them.

    For a ``signed`` actuator 0 is a limit like any other, unless both keys are 0.
    """
    lower, upper = config.command_min, config.command_max
    if actuator_of(config).signed and (lower or upper):
        return lower, upper
    return lower or default[0], upper or default[1]
