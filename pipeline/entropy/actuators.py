"""The actuators: what a controller may turn to move the entropy, and how far.

Inside a controller a command is a number ``u`` in the actuator's own unit, 0 at rest: ln T for temperatures, the
coefficient or fraction itself for the others. At rest a coefficient or fraction does nothing; a positive term at T=1 is
still added with its weight ``entropy.alpha``, only its temperature no longer favours unlikely tokens over likely ones. Limits and gains were measured on a 100k-parameter model
with a target of 0.3 nats (docs/methods.md); they are starting points for another, not laws.

A negative coefficient is refused, but by ``high_prob``, which is made for both signs: turned on incorrect samples it feeds back on
itself and collapses the policy, and on correct ones it only hastens what the policy gradient does anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.pi import integral_gain


@dataclass(frozen=True)
class Actuator:
    """One row of the table. ``lower``, ``upper`` and ``neutral`` are commands; ``kp`` is in units of ``u``."""

    name: str
    lower: float
    upper: float
    neutral: float  # the command at rest, before any reading: u = 0; for a temperature 1
    kp: float  # u per unit of ln H
    temperature: bool = False  # the command is a temperature, u = ln T
    second_rollout: bool = False  # draws auxiliary samples
    positive_term: bool = False  # scaled by ``entropy.alpha``: with alpha 0 it does nothing

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


def _temperature(name: str, lower: float, upper: float, kp: float, second_rollout: bool = False) -> Actuator:
    return Actuator(name, lower, upper, 1.0, kp, True, second_rollout, positive_term=True)


ACTUATORS = {
    actuator.name: actuator
    for actuator in (
        _temperature("resample", 0.6, 1.6, 3.0, second_rollout=True),
        _temperature("reweight", 1.0, 6.0, 2.0),
        _temperature("fc", 1.0, 6.0, 2.0),
        _temperature("dcpo", 0.8, 6.0, 2.0),  # gains and upper limit taken over from reweight, not measured
        Actuator("tok", 0.0, 3.0, 0.0, 2.0),
        Actuator("entropy_bonus", 0.0, 0.4, 0.0, 0.6),
        Actuator("high_prob", -1.0, 1.0, 0.0, 1.0),
        Actuator("clip_cov", 0.0, 0.2, 0.0, 0.08),
    )
}


def actuator_of(config: EntropyConfig) -> Actuator:
    """The configured actuator."""
    return ACTUATORS[config.actuator]


def acting(config: EntropyConfig) -> Actuator | None:
    """The actuator that takes part in training; ``None`` for plain GRPO: no controller, or a positive term of weight 0."""
    if config.controller == "none":
        return None
    actuator = actuator_of(config)
    return None if actuator.positive_term and config.alpha == 0 else actuator


def command_limits(config: EntropyConfig, default: tuple[float, float]) -> tuple[float, float]:
    """Configured limits of the command, or ``default`` where both keys are 0; ``entropy_rules`` has checked them."""
    given = (config.command_min, config.command_max)
    return default if given == (0, 0) else given
