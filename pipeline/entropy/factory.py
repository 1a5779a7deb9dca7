"""From configuration to a controller: its file builds the law, this module the loop around it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, acting, actuator_of
from pipeline.entropy.band import Band
from pipeline.entropy.closed_loop import ClosedLoop
from pipeline.entropy.controller import EntropyController
from pipeline.entropy.held import HeldCommand
from pipeline.entropy.law import Hold
from pipeline.registry import load
from pipeline.types import ControlDecision, EntropyReading

CONTROLLERS = "pipeline.entropy.controllers"


def build_controller(config: EntropyConfig, band: Band, prompts_per_step: int) -> EntropyController:
    """The configured controller, whose saved state only fits the same configuration.

    Args:
        config: the ``entropy`` section, checked.
        band: where it steers.
        prompts_per_step: most auxiliary prompts there can be.
    """
    actuator, acts = actuator_of(config), acting(config) is not None
    built = load(CONTROLLERS, config.controller if acts else "none").build(config, actuator)
    prompts = _prompts(config, actuator, prompts_per_step) if acts else (0, 0)
    if isinstance(built, Hold):
        temperature = built.command if actuator.temperature else 1.0
        decision = ControlDecision(built.command, temperature, prompts[0], built.state, built.reason)
        return Fingerprinted(HeldCommand(decision), _fingerprint(asdict(decision)))
    loop = ClosedLoop(
        built.law,
        actuator,
        band,
        built.sensor,
        built.set_point,
        limits=built.limits,
        prompts=prompts,
        saturation_steps=config.pi.saturation_steps,
    )
    laws = {**asdict(config), "band": band.fingerprint}  # of the band what decides it, however it was written
    return Fingerprinted(loop, _fingerprint([laws, prompts]))


class OtherConfigurationError(ValueError):
    """A state is of a controller that is configured differently."""


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
        """See ``EntropyController``. Raises ``OtherConfigurationError`` if the state was saved under another one."""
        if state.get("config") != self._fingerprint:
            raise OtherConfigurationError("the controller's state was saved under another `entropy` configuration")
        self._controller.load_state_dict(state.get("controller", {}))


def _prompts(config: EntropyConfig, actuator: Actuator, prompts_per_step: int) -> tuple[int, int]:
    """Least and most auxiliary prompts."""
    if not actuator.second_rollout:
        return 0, 0
    least = config.auxiliary_prompts
    most = (config.auxiliary_max_prompts or prompts_per_step) if config.pi.split_range else least
    return least, most


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
