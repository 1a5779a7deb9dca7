"""What a controller steers, as a model to try it on: ln H integrates the command, against GRPO's drift.

With y = ln H of the policy before update k, u_k the command in force at that update, s the age of what it trains on:

    a_k     = a_{k-1} + (m_k mean u_{k-s} - a_{k-1}) / lag        the optimizer's momentum; the mean is over groups
    y_{k+1} = y_k + b H / (H + knee) a_k + d (H / H_d)^p + noise      H = exp(y_k), H_d = 0.3
    reading = exp(y_{k - sensor_lag} + noise), or an outlier

``m`` is 1, or 0 where no positive was found. The gain b fades as H -> 0: for a peaked policy the local form sum_a
pi_a^2 (log pi_a + H)^2 of arXiv 2510.08141 is of order H^2 in H, of order H in ln H. With p > 0 the drift grows with H,
so a command at its limit holds some entropy and no higher one: the ceiling seen on real runs. Gain, drift, power and
noise default to what was measured on a 100k-parameter model (docs/control.md); another model has others (``isentrope
entropy calibrate``).

Everything is deterministic in the seed. Units: nats, steps; u is in the actuator's own unit (ln T for temperatures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.config.schema import BandConfig, EntropyConfig
from pipeline.entropy.actuator import Actuator, acting
from pipeline.entropy.band import build_band
from pipeline.entropy.controller import EntropyController
from pipeline.entropy.factory import build_controller
from pipeline.types import ControlDecision, EntropyReading

JUMP = 0.05  # of ln H* from a step to the next: more is no schedule that an entropy could follow
DRIFT_AT = 0.3  # nats, the entropy at which ``Plant.drift`` is the drift
_TOKENS = 100.0  # of a simulated reading: a sum needs a count
_PROMPTS = 64  # of a simulated step: bounds the auxiliary ones
_GROUPS = 4  # of a simulated step through which the command acts
_FLOOR, _CEILING = math.log(1e-6), math.log(20.0)  # of y: no policy has less or more


@dataclass(frozen=True)
class Plant:
    """Parameters of the model above."""

    gain: float = 0.016  # b, of ln H per unit of u and step
    drift: float = -0.0035  # d, of ln H per step at H = 0.3
    drift_power: float = 0.0  # p
    knee: float = 0.0  # nats; 0: the gain does not fade
    lag: float = 4.0  # steps; 1: none
    delay: int = 0  # least s, steps
    age_spread: int = 0  # each group's s is one of delay, ..., delay + age_spread, drawn anew at every step
    process_noise: float = 0.007  # standard deviation per step, of ln H
    sensor_noise: float = 0.06  # standard deviation of ln of a reading
    sensor_lag: int = 0  # steps
    repeated_noise: float = 0.01  # standard deviation of ln of a repeated reading, where the configuration asks for any
    outliers: float = 0.0  # share of readings that are a third or three times what they should be

    def reachable(self, lower: float, upper: float) -> tuple[float, float]:
        """The entropies that commands between ``lower`` and ``upper`` (u) can hold; (0, inf) where nothing
        bounds them.
        """
        if self.drift_power == 0:
            return 0.0, math.inf if self.gain * upper > -self.drift else 0.0

        def held(u: float) -> float:
            return DRIFT_AT * max(0.0, self.gain * u / -self.drift) ** (1 / self.drift_power)

        return held(lower), held(upper)


@dataclass(frozen=True)
class Scenario:
    """A plant, what happens to it, and the band it is asked to keep."""

    name: str
    plant: Plant = Plant()
    start: float = 0.55  # nats
    target: float = 0.3  # middle of the band, which is +-10 % wide
    target_steps: Mapping[int, float] = field(default_factory=dict)  # step -> target from then on
    anneal: tuple[int, float] | None = None  # step from which the target moves, and where it is at the end
    changes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # step -> parameters from then on
    no_positives: tuple[tuple[int, int], ...] = ()  # spells [first, last)
    steps: int = 400

    def band(self) -> BandConfig:
        """The band as a run would be given it."""
        low, high = 0.9 * self.target, 1.1 * self.target
        if self.anneal:
            hold, end = self.anneal
            return BandConfig(low, high, "cosine", hold_steps=hold, end_low=0.9 * end, end_high=1.1 * end)
        points = [[float(step), 0.9 * target, 1.1 * target] for step, target in self.target_steps.items()]
        schedule = "piecewise" if points else "constant"
        return BandConfig(low=low, high=high, schedule=schedule, points=points)

    def plant_at(self, step: int) -> Plant:
        """The plant in force at ``step``."""
        plant = self.plant
        for first, parameters in self.changes.items():
            if step >= first:
                plant = replace(plant, **parameters)
        return plant


# Engines that are slow now and then: for 25 steps of 50 samples are three to eight updates old, else at most one.
_SPELLS = {at + 25: {"delay": 3, "age_spread": 5} for at in range(0, 400, 50)}
_SPELLS = dict(sorted((_SPELLS | {at: {"delay": 0, "age_spread": 1} for at in range(50, 400, 50)}).items()))
_BENT = Plant(drift_power=1.0, knee=0.02)
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("nominal"),
        Scenario("hold", start=0.3),
        Scenario("rise from 0.15", _BENT, start=0.15),
        Scenario("drift and gain vary with H", _BENT),
        Scenario("delay 1", Plant(delay=1)),
        Scenario("delay 2", Plant(delay=2)),
        Scenario("delay 4", Plant(delay=4)),
        Scenario("lag 16", Plant(lag=16)),
        Scenario("ages 0 to 4", Plant(age_spread=4)),
        Scenario("ages 0 to 8", Plant(age_spread=8)),
        Scenario("ages in spells", Plant(age_spread=1), changes=_SPELLS),
        Scenario("noisy sensor", Plant(sensor_noise=0.12)),
        Scenario("quiet sensor", Plant(sensor_noise=0.03)),
        Scenario("noisy policy", Plant(process_noise=0.012)),
        Scenario("sensor lag 3", Plant(sensor_lag=3)),
        Scenario("5 % outliers", Plant(outliers=0.05)),
        Scenario("gain halves", changes={200: {"gain": 0.0085}}),
        Scenario("gain doubles", changes={200: {"gain": 0.032}}),
        Scenario("learning rate doubles", changes={200: {"gain": 0.032, "drift": -0.007}}),
        Scenario("drift changes", changes={130: {"drift": -0.006}, 260: {"drift": -0.0015}}),
        Scenario("no positives", no_positives=((120, 130), (200, 203), (300, 320))),
        Scenario("target steps", target_steps={150: 0.36, 280: 0.27}),
        Scenario("high entropy", Plant(gain=0.03, drift=-0.006, sensor_noise=0.03), start=1.2, target=0.8),
    )
}


@dataclass(frozen=True)
class Trace:
    """A simulated run, one entry per step."""

    entropy: np.ndarray  # float64 [steps], nats, the policy's own before each update
    target: np.ndarray  # float64 [steps], middle of the band
    readings: np.ndarray  # float64 [steps], nats, what the controller was given
    commands: np.ndarray  # float64 [steps], u in force at each update
    decisions: list[ControlDecision]  # made after each update


def simulate(entropy: EntropyConfig, scenario: Scenario, seed: int, staleness: float | None = 0) -> Trace:
    """Run the configured controller on ``scenario``, whose band replaces the configuration's.

    ``staleness`` is what the readings tell the law; None: the mean age of each step's groups, as a run measures it.
    Raises ``ValueError`` on a configuration that has no acting controller.
    """
    actuator = acting(entropy)
    if actuator is None:
        raise ValueError("nothing to simulate: entropy.controller=none, or entropy.alpha=0")
    config = replace(entropy, band=scenario.band())
    control = build_controller(config, build_band(config.band, scenario.steps), _PROMPTS)
    return _run(control, actuator, scenario, seed, staleness, config.repeated_prompts > 0)


def _run(
    control: EntropyController,
    actuator: Actuator,
    scenario: Scenario,
    seed: int,
    staleness: float | None,
    repeats: bool,
) -> Trace:
    rng = np.random.default_rng([seed, len(scenario.name), *scenario.name.encode()])
    draws = rng.standard_normal((scenario.steps, 2))
    strays = rng.random((scenario.steps, 2))
    again = rng.standard_normal(scenario.steps)
    spread = np.random.default_rng([1, seed]).random((scenario.steps, _GROUPS))
    y, momentum, decision = math.log(scenario.start), 0.0, control.initial()
    states: list[float] = []
    commands: list[float] = []
    readings, decisions = [], []
    for k in range(scenario.steps):
        plant = scenario.plant_at(k)
        states.append(y)
        commands.append(actuator.to_u(decision.command))
        barren = any(first <= k < last for first, last in scenario.no_positives)
        seen = states[max(0, k - plant.sensor_lag)] + plant.sensor_noise * draws[k, 0]
        if strays[k, 0] < plant.outliers:
            seen += math.copysign(math.log(3), strays[k, 1] - 0.5)
        ages = plant.delay + (spread[k] * (plant.age_spread + 1)).astype(int)
        pushed = 0.0 if barren else sum(commands[max(0, k - age)] for age in ages.tolist()) / _GROUPS
        momentum += (pushed - momentum) / plant.lag
        y += _move(plant, y, momentum) + plant.process_noise * draws[k, 1]
        y = min(max(y, _FLOOR), _CEILING)
        told = float(ages.mean()) if staleness is None else staleness
        repeated = math.exp(states[-1] + plant.repeated_noise * again[k]) if repeats else None
        reading = EntropyReading(math.exp(seen) * _TOKENS, _TOKENS, k, told, repeated)
        decision = control.update(reading, 0 if barren else 8)
        readings.append(reading.mean)
        decisions.append(decision)
    band = build_band(scenario.band(), scenario.steps)
    target = np.array([sum(band.at(step)) / 2 for step in range(scenario.steps)])
    return Trace(np.exp(states), target, np.array(readings), np.array(commands), decisions)


def _move(plant: Plant, y: float, u: float) -> float:
    entropy = math.exp(y)
    fade = entropy / (entropy + plant.knee) if plant.knee else 1.0
    return plant.gain * fade * u + plant.drift * (entropy / DRIFT_AT) ** plant.drift_power


@dataclass(frozen=True)
class Performance:
    """How well a trace keeps its band; errors are relative, H / target - 1, of the policy's true entropy.

    Steps of the way to the band, ``settle`` after the start and after each jump of the target, count for
    ``overshoot``, ``settling`` and ``variation`` only.
    """

    time_in_band: float  # share of steps within +-10 % of the target
    rms: float  # root mean square error
    overshoot: float  # largest error beyond the target, on the side away from the start; >= 0
    settling: float  # first step from which 20 steps lie in the band; the number of steps if there is none
    oscillation: float  # sign changes of the error per 100 steps
    variation: float  # mean |u_k - u_{k-1}|: of ln T for a temperature


def performance(trace: Trace, settle: int = 100, width: float = 0.1) -> Performance:
    """The figures of one trace. ``width``: half the band, relative."""
    error = trace.entropy / trace.target - 1
    inside = np.abs(error) <= width
    moved = np.flatnonzero(np.abs(np.diff(np.log(trace.target))) > JUMP) + 1
    counted = np.ones(len(error), bool)
    for first in (0, *moved):
        counted[first : first + settle] = False
    if not counted.any():
        counted[-1] = True
    kept = error[counted]
    runs = np.convolve(inside, np.ones(20), "valid") == 20
    first = int(moved[0]) if len(moved) else len(error)  # the steps before any change of the target
    side = np.sign(error[0]) if abs(error[0]) > width else 0.0
    beyond = np.abs(error[:first]) if side == 0 else -side * error[:first]
    signs = np.sign(kept[kept != 0])
    return Performance(
        time_in_band=float(inside[counted].mean()),
        rms=float(np.sqrt((kept**2).mean())),
        overshoot=max(0.0, float(beyond.max())),
        settling=float(np.argmax(runs)) if runs.any() else float(len(error)),
        oscillation=100 * float((signs[1:] != signs[:-1]).sum()) / max(1, len(kept)),
        variation=float(np.abs(np.diff(trace.commands)).mean()),
    )
