"""From an identified plant to controller gains, and what they should achieve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import actuator_of, command_limits
from pipeline.entropy.gains import MOMENTUM_STEPS, integral_gain, proportional_gain
from pipeline.entropy.identify import IdentificationError, Identified, Record, identify
from pipeline.entropy.plant import Performance, Plant, Scenario, performance, simulate

SIMULATED_SEEDS = 8
SIMULATED_STEPS = 300
_FIRST = 10  # entropies that say where the policy started


@dataclass(frozen=True)
class Prediction:
    """Means over simulated runs, see ``plant.Performance``."""

    kp: float
    ki: float
    time_in_band: float
    rms: float
    overshoot: float
    settling: float
    variation: float


@dataclass(frozen=True)
class Calibration:
    """What ``isentrope entropy calibrate`` reports."""

    actuator: str
    plant: Identified
    rest_command: float  # that holds the entropy, in the actuator's unit
    limits: tuple[float, float]  # of the command
    reachable: bool  # whether that command lies within the limits
    kp: float
    ki: float
    predictions: dict[str, Prediction]  # "present" gains and "proposed" ones
    overrides: list[str]


def calibration(config: EntropyConfig, records: Sequence[Record]) -> Calibration:
    """Kp = 1 / (b (tc + dead time)), internal model control with the identified delay in the dead time; ki in
    proportion.

    Raises ``IdentificationError`` where the data do not tell the sign of the gain.
    """
    plant = identify(records)
    low, high = plant.gain_interval
    if low <= 0:
        wrong = "acts against its command" if high < 0 else "may be none"
        raise IdentificationError(
            f"the gain of {config.actuator} is {plant.gain:.3g} [{low:.3g}, {high:.3g}]: it {wrong}; "
            "use a longer run or --excite with more steps, or another actuator"
        )
    actuator = actuator_of(config)
    limits = command_limits(config, (actuator.lower, actuator.upper))
    kp = float(f"{proportional_gain(plant.gain, max(0, plant.delay - MOMENTUM_STEPS)):.3g}")
    ki = integral_gain(kp)
    present = (config.pi.kp, config.pi.ki) if config.pi.kp else (actuator.kp, actuator.ki)
    start = float(np.exp(np.mean(np.log([h for h in records[0].entropy if h > 0][:_FIRST]))))
    rest = -plant.drift / plant.gain
    return Calibration(
        actuator=config.actuator,
        plant=plant,
        rest_command=actuator.to_command(rest),
        limits=limits,
        reachable=limits[0] <= actuator.to_command(rest) <= limits[1],
        kp=kp,
        ki=ki,
        predictions={
            "present": _predict(config, plant, start, *present),
            "proposed": _predict(config, plant, start, kp, ki),
        },
        overrides=[f"entropy.pi.kp={kp:g}", f"entropy.pi.ki={ki:g}"],
    )


def _predict(config: EntropyConfig, plant: Identified, start: float, kp: float, ki: float) -> Prediction:
    band = config.band
    model = Plant(
        gain=plant.gain,
        drift=plant.drift,
        lag=1,
        delay=plant.delay,
        sensor_noise=plant.sensor_noise,
        process_noise=plant.process_noise,
    )
    target = math.sqrt(band.low * band.high)
    scenario = Scenario("identified", model, start=start, target=target, steps=SIMULATED_STEPS)
    trial = replace(config, controller="pi", pi=replace(config.pi, kp=kp, ki=ki, split_range=False))
    half = math.sqrt(band.high / band.low) - 1
    runs = [performance(simulate(trial, scenario, seed), width=half) for seed in range(SIMULATED_SEEDS)]

    def mean(figure: str) -> float:
        return float(np.mean([getattr(run, figure) for run in runs]))

    figures = [name for name in Performance.__dataclass_fields__ if name in Prediction.__dataclass_fields__]
    return Prediction(kp=kp, ki=ki, **{name: mean(name) for name in figures})
