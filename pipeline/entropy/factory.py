"""From configuration to a controller."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from pipeline.config.check import key_problems
from pipeline.config.entropy_rules import controller_problems
from pipeline.config.errors import ConfigError
from pipeline.config.schema import EntropyConfig
from pipeline.entropy import entropic, scope
from pipeline.entropy.actuators import Actuator, acting, command_limits
from pipeline.entropy.aent import AentLaw
from pipeline.entropy.band import Band, SetPoint
from pipeline.entropy.bang_bang import BangBangLaw
from pipeline.entropy.closed_loop import ClosedLoop
from pipeline.entropy.constant import ConstantCommand
from pipeline.entropy.controller import EntropyController
from pipeline.entropy.entropic import EntropicLaw
from pipeline.entropy.law import Law
from pipeline.entropy.none import NoControl
from pipeline.entropy.pi import NOISY, QUIET, PiLaw
from pipeline.entropy.scope import ScopeLaw
from pipeline.entropy.sensor import HAMPEL_WINDOW, Sensor
from pipeline.entropy.skywork import SkyworkLaw
from pipeline.types import ControlDecision, EntropyReading


def build_controller(config: EntropyConfig, total_steps: int, prompts_per_step: int) -> EntropyController:
    """The configured controller, whose saved state only fits the same configuration.

    Args:
        config: the ``entropy`` section.
        total_steps: length of the run, for schedules that stretch over it.
        prompts_per_step: most auxiliary prompts there can be.

    Raises:
        ConfigError: a controller, actuator or limit that is unknown or does not go with the rest.
        ValueError: a band that does not fit the run.
    """
    problems = [*key_problems(config, "entropy.")] or [*controller_problems(config, prompts_per_step)]
    if problems:
        raise ConfigError.of(problems)
    actuator = acting(config)
    if actuator is None:
        off = config.controller == "none"
        reason = "no entropy control" if off else f"entropy.alpha is 0, so {config.actuator} does nothing: plain GRPO"
        return Fingerprinted(NoControl(reason), _fingerprint(asdict(config)))
    prompts = _prompts(config, actuator, prompts_per_step)
    if config.controller == "constant":
        return Fingerprinted(ConstantCommand(actuator, config.command, prompts[0]), _fingerprint(asdict(config)))
    band = Band(config.band, total_steps)
    limits = _limits(config, actuator)
    pi = config.controller == "pi"
    loop = ClosedLoop(
        _law(config, actuator, limits),
        actuator,
        band,
        Sensor(config.pi.ema, HAMPEL_WINDOW) if pi else Sensor(),
        SetPoint(config.pi.setpoint_ramp if pi else 0.0),
        limits=limits,
        prompts=prompts,
        saturation_steps=config.pi.saturation_steps,
    )
    return Fingerprinted(loop, _fingerprint([asdict(config), band.fingerprint, prompts]))


class Fingerprinted:
    """An ``EntropyController`` that refuses the state of a differently configured one."""

    def __init__(self, controller: EntropyController, fingerprint: str) -> None:
        self._controller = controller
        self._fingerprint = fingerprint

    def initial(self) -> ControlDecision:
        """See ``EntropyController``."""
        return self._controller.initial()

    def update(self, reading: EntropyReading, positives: int) -> ControlDecision:
        """See ``EntropyController``."""
        return self._controller.update(reading, positives)

    def state_dict(self) -> dict[str, Any]:
        """See ``EntropyController``."""
        return {"config": self._fingerprint, "controller": self._controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``EntropyController``. Raises ``ValueError`` if the state was saved under another configuration."""
        if state.get("config") != self._fingerprint:
            raise ValueError(
                f"controller state was saved under entropy configuration {state.get('config')}, this run has "
                f"{self._fingerprint}: resume with the run's own config.yaml, or start a new run"
            )
        self._controller.load_state_dict(state["controller"])


def _law(config: EntropyConfig, actuator: Actuator, limits: tuple[float, float]) -> Law:
    match config.controller:
        case "scope":
            return ScopeLaw(*limits)
        case "bang_bang":
            return BangBangLaw(*limits)
        case "skywork":
            return SkyworkLaw(config.skywork.step, limits[1])
        case "aent":
            return AentLaw(config.aent.rate, config.aent.least, limits[1])
        case "entropic":
            return EntropicLaw(config.entropic.kp, config.entropic.ki, *limits)
    pi = config.pi
    kp, ki = (pi.kp, pi.ki) if pi.kp else (actuator.kp, actuator.ki)
    lower, upper = actuator.to_u(limits[0]), actuator.to_u(limits[1])
    pace = QUIET if config.repeated_prompts else NOISY
    return PiLaw(kp, ki, lower, upper, adapt=pi.adapt, slew=pi.slew, dead_band=pi.dead_band, pace=pace)


def _limits(config: EntropyConfig, actuator: Actuator) -> tuple[float, float]:
    default = {
        "scope": scope.LIMITS,
        "bang_bang": scope.LIMITS,
        "skywork": (0.0, config.skywork.upper),
        "aent": (0.0, config.aent.most),
        "entropic": entropic.LIMITS,
    }.get(config.controller, (actuator.lower, actuator.upper))
    return command_limits(config, default)


def _prompts(config: EntropyConfig, actuator: Actuator, prompts_per_step: int) -> tuple[int, int]:
    """Least and most auxiliary prompts."""
    if not actuator.second_rollout:
        return 0, 0
    least = config.auxiliary_prompts
    most = (config.auxiliary_max_prompts or prompts_per_step) if config.pi.split_range else least
    return least, most


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
