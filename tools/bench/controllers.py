"""Compares the controllers on the simulated plant: every scenario, many seeds.

    python -m tools.bench.controllers --seeds 32          # about a minute on one core
    python -m tools.bench.controllers --reach             # out of reach or slow: what could be told at best
    python -m tools.bench.controllers --collapse          # entropy that halves in ten to thirty steps
    python -m tools.bench.controllers --drawn 200         # plants drawn at random
    python -m tools.bench.controllers --late --seeds 16   # a fast collapse under a bonus that is felt eight steps late

All laws get the same second rollout (actuator ``resample``) and the same limits, T+ from 0.6 to 1.6, so that laws are
compared and not limits; ``pi, default`` is the default configuration, its own actuator and limits. Prints a Markdown
table of means over seeds and writes the figures to runs/bench/controllers.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from launchers.lab.figures import markdown_table
from pipeline.config.schema import EntropyConfig, PiConfig
from pipeline.entropy.gains import integral_gain
from pipeline.entropy.plant import DRIFT_AT, SCENARIOS, Performance, Plant, Scenario, Trace, performance, simulate
from pipeline.entropy.watch import AWAY_STEPS, UNREACHABLE_STEPS

EQUAL: dict[str, Any] = {"actuator": "resample", "command_min": 0.6, "command_max": 1.6}
CONTROLLERS = {
    "pi, default": EntropyConfig(),
    "pi": EntropyConfig(controller="pi", **EQUAL),
    "pi, repeated": EntropyConfig(controller="pi", repeated_prompts=32, **EQUAL),
    "scope v7": EntropyConfig(controller="scope", **EQUAL),
    "bang_bang": EntropyConfig(controller="bang_bang", **EQUAL),
}
# Targets above what the command can hold, and targets that are reached slowly: how well are they told apart?
_CEILING = Plant(gain=0.0114, drift=-0.003, drift_power=1.6)  # holds 0.43 nats at T = 1.6
OUT_OF_REACH = (
    Scenario("0.50 from above, ceiling 0.43", _CEILING, start=0.55, target=0.5),
    Scenario("0.50 from below, ceiling 0.43", _CEILING, start=0.35, target=0.5),
    Scenario("drift beyond authority", Plant(gain=0.006, drift=-0.004), start=0.3, target=0.3),
)
STEEP = (
    Scenario("0.35 from 0.14", Plant(drift=-0.003), start=0.14, target=0.35),
    Scenario("0.30 from 0.20, drift grows", Plant(drift_power=0.5), start=0.2, target=0.3),
    SCENARIOS["rise from 0.15"],
)
# A collapse reaches its band in ten to thirty steps, with a gain of one to eight times the one assumed.
COLLAPSES = tuple(
    Scenario(
        f"reading noise {noise:.0%}",
        Plant(
            0.152 * ratio,
            drift * (DRIFT_AT / target) ** power,
            power,
            lag=3.0,
            process_noise=0.009,
            sensor_noise=noise,
        ),
        start,
        target,
        steps=160,
    )
    for noise in (0.02, 0.06, 0.13, 0.27)
    for power in (0.0, 1.0)
    for drift, start, target in ((-0.02, 0.9, 0.45), (-0.04, 1.2, 0.5), (-0.02, 0.6, 0.25))
    for ratio in (0.5, 1, 4)
)
# What `isentrope entropy calibrate` found of SmolLM2 under the bonus (docs/smollm2.md), and how it may answer late.
_SMOLLM2 = Plant(gain=0.65, drift=-0.042, process_noise=0.01, sensor_noise=0.113)
LATE = {
    "a delay of 8": replace(_SMOLLM2, delay=7, lag=1.0),
    "a lag of 4 after a delay of 5": replace(_SMOLLM2, delay=5, lag=4.0),
    "a lag of 9": replace(_SMOLLM2, lag=9.0),
}
LATE_GAINS = (0.131, 0.0572)  # kp: what its noise asked for, and what its delay does
ROOM = math.log(EQUAL["command_max"])  # u at the upper limit
FIGURES = tuple(Performance.__dataclass_fields__)


def measure(scenario: str, controller: str, seeds: int) -> dict[str, float]:
    """Means over seeds 0 to ``seeds`` - 1 of every figure of ``Performance``."""
    case = SCENARIOS[scenario]
    runs = [asdict(performance(simulate(CONTROLLERS[controller], case, seed, None))) for seed in range(seeds)]
    return {name: float(np.mean([run[name] for run in runs])) for name in FIGURES}


def first_warning(scenario: Scenario, seed: int, controller: str = "pi") -> tuple[int | None, str]:
    """Steps from the first one at the upper limit to the first "not reachable", and the warning's text.

    (None, "") without a warning.
    """
    trace = simulate(CONTROLLERS[controller], scenario, seed, None)
    limited = None
    for step, decision in enumerate(trace.decisions):
        if limited is None and decision.command == EQUAL["command_max"]:
            limited = step
        if "not reachable" in decision.reason:
            return step - (step if limited is None else limited), decision.reason
    return None, ""


def reach_table(seeds: int) -> str:
    """Markdown: how often and how soon a target is called out of reach."""
    lines = []
    for scenario in (*OUT_OF_REACH, *STEEP, SCENARIOS["nominal"]):
        for controller in ("pi", "pi, repeated"):
            steps = [first_warning(scenario, seed, controller)[0] for seed in range(seeds)]
            found = [number for number in steps if number is not None]
            soon = sum(number <= 30 for number in found) / seeds
            median = f"{np.median(found):.0f}" if found else "-"
            lines.append([scenario.name, controller, f"{len(found) / seeds:.0%}", f"{soon:.0%}", median])
    columns = ["target", "controller", "called out of reach", "within 30 steps at the limit", "median steps"]
    return markdown_table(columns, lines)


def errors_from_entry(trace: Trace, within: float) -> np.ndarray:
    """Relative errors of the true entropy from the first step on at which it is that near to its target."""
    error = trace.entropy / trace.target - 1
    return error[int(np.argmax(np.abs(error) <= within)) :]


# How a collapse is met, and the gain there, of the bonus's.
MEETING = {
    "pi": (EntropyConfig(actuator="entropy_bonus"), 1.0),
    "pi, repeated": (EntropyConfig(actuator="entropy_bonus", repeated_prompts=32), 1.0),
    "pi, T from 0.5 to 6": (EntropyConfig(command_min=0.5, command_max=6.0), 1 / 3),
}


def collapse_table(seeds: int) -> str:
    """Markdown: how a collapse is met, by its true entropy in the 100 steps from the first in the band on."""
    lines = []
    for name in dict.fromkeys(case.name for case in COLLAPSES):
        for controller, (config, share) in MEETING.items():
            found = []
            for case in (case for case in COLLAPSES if case.name == name):
                plant = replace(case.plant, gain=share * case.plant.gain)
                for seed in range(seeds):
                    held = errors_from_entry(simulate(config, replace(case, plant=plant), seed), 0.1)[:100]
                    found.append(((np.abs(held) <= 0.1).mean(), math.sqrt((held**2).mean()), -held.min(), held.max()))
            inside, rms, below, above = np.mean(found, 0)
            lines.append([name, controller, f"{inside:.0%}", f"{rms:.3f}", f"{below:.2f}", f"{above:.2f}"])
    return markdown_table(["collapse", "controller", "in band", "RMS", "furthest below", "furthest above"], lines)


def strangers(count: int) -> tuple[list[Scenario], list[Scenario]]:
    """Plants drawn at random, on which nothing was tuned: with targets out of reach, and with targets reached slowly.

    At its target the limit's rate is below -0.0005 per step in the first, above 0.0025 in the second.
    """
    rng = np.random.default_rng(7)
    beyond: list[Scenario] = []
    within: list[Scenario] = []
    while len(beyond) + len(within) < count:
        gain, drift, start, target = np.exp(
            rng.uniform(np.log([5e-3, 1.5e-3, 0.12, 0.2]), np.log([0.03, 8e-3, 0.6, 0.6]))
        )
        noise = {"process_noise": rng.uniform(0.003, 0.01), "sensor_noise": rng.uniform(0.03, 0.09)}
        plant = Plant(gain, -drift, float(rng.choice([0, 0.5, 1, 1.6])), float(rng.choice([0, 0.02])), **noise)
        case = Scenario(f"stranger {len(beyond) + len(within)}", plant, float(start), float(target), steps=300)
        rate = rate_at_limit(plant, case.target)
        if rate < -0.0005:
            beyond.append(case)
        elif rate > 0.0025 and start < target:
            within.append(case)
    return beyond, within


def rate_at_limit(plant: Plant, entropy: np.ndarray | float) -> np.ndarray | float:
    """Of ln H per step at the upper limit."""
    fade = entropy / (entropy + plant.knee) if plant.knee else 1.0
    return plant.gain * fade * ROOM + plant.drift * (entropy / DRIFT_AT) ** plant.drift_power


def least(scenario: Scenario, seed: int, controller: str, last: int | None) -> tuple[float, float] | None:
    """The least that two observers see of ln H per step from 25 steps at the limit on, up to step ``last`` of them.

    One knows the policy's entropy exactly and takes its mean step at the limit, which is all that a random walk tells
    of its drift. The other knows the plant, and takes its rate. None where the command is not at the limit for so long.
    """
    trace = simulate(CONTROLLERS[controller], replace(scenario, steps=300), seed, None)
    limited = trace.commands >= ROOM - 1e-9
    if not limited.any():
        return None
    first, known = int(np.argmax(limited)), np.log(trace.entropy)
    found = []
    for step in range(first + UNREACHABLE_STEPS, len(limited) if last is None else first + last + 1):
        count = UNREACHABLE_STEPS
        while count < AWAY_STEPS and limited[step - count]:
            count += 1
        if limited[step - count + 1 : step + 1].all():
            rise = float(known[step] - known[step - count + 1]) / (count - 1)
            found.append((rise, rate_at_limit(scenario.plant, trace.entropy[step])))
    return (min(rise for rise, _ in found), min(float(rate) for _, rate in found)) if found else None


def bound_table(seeds: int) -> str:
    """Markdown: targets out of reach that the observers of ``least`` find within 30 steps, at 10 % false alarms."""
    lines = []
    groups: dict[str, tuple[Sequence[Scenario], Sequence[Scenario], int]] = {
        "of the table above": (OUT_OF_REACH, STEEP, seeds),
        "strangers": (*strangers(400), 1),
    }
    for name, (beyond, within, each) in groups.items():
        for controller in ("pi", "pi, repeated"):
            missed, climbed = (
                np.array(
                    [seen for case in cases for seed in range(each) if (seen := least(case, seed, controller, last))]
                )
                for cases, last in ((beyond, 30), (within, None))
            )
            found = [(missed[:, by] < np.quantile(climbed[:, by], 0.1)).mean() for by in (0, 1)]
            lines.append([name, controller, *(f"{share:.0%}" for share in found)])
    return markdown_table(["plants", "controller", "by the exact entropy", "by the plant's rate"], lines)


def drawn(count: int) -> list[Scenario]:
    """Plants drawn at random, on which nothing was tuned, with targets that can be held: lags of 1 to 20 steps, delays
    of 0 to 4, gains of a quarter to eight times the one assumed.
    """
    rng = np.random.default_rng(11)
    cases: list[Scenario] = []
    while len(cases) < count:
        gain, drift, start, target, lag = np.exp(
            rng.uniform(np.log([4e-3, 1e-3, 0.15, 0.2, 1]), np.log([0.13, 8e-3, 0.9, 0.6, 20]))
        )
        noise = {"process_noise": rng.uniform(0.003, 0.01), "sensor_noise": rng.uniform(0.03, 0.09)}
        power, knee = float(rng.choice([0, 0.5, 1, 1.6])), float(rng.choice([0, 0.02]))
        plant = Plant(gain, -drift, power, knee, float(lag), int(rng.integers(0, 5)), **noise)
        if rate_at_limit(plant, target) > 0.0025:
            cases.append(Scenario(f"drawn {len(cases)}", plant, float(start), float(target)))
    return cases


def late(case: Scenario) -> Scenario:
    """The same, but for an answer that comes all at once, as late as it came on average."""
    plant = case.plant
    return replace(case, plant=replace(plant, delay=plant.delay + max(0, round(plant.lag) - 2), lag=2.0))


def drawn_table(cases: Sequence[Scenario], controllers: Mapping[str, EntropyConfig]) -> str:
    """Markdown: how each controller holds the plants, from step 100 on."""
    lines = []
    for controller, config in controllers.items():
        found = [performance(simulate(config, case, 0, None)) for case in cases]
        errors = [each.rms for each in found]
        inside = np.mean([each.time_in_band for each in found])
        figures = np.median(errors), np.quantile(errors, 0.9), np.mean([each.variation for each in found])
        lines.append([controller, f"{inside:.0%}", *(f"{figure:.3f}" for figure in figures)])
    return markdown_table(["controller", "in band", "RMS, median", "RMS, nine of ten below", "mean abs d u"], lines)


def late_table(seeds: int) -> str:
    """Markdown: how the bonus holds ``LATE``, by its true entropy from the first step near the target on."""
    lines = []
    for answer, plant in LATE.items():
        for kp in LATE_GAINS:
            config = EntropyConfig(actuator="entropy_bonus", pi=PiConfig(kp=kp, ki=integral_gain(kp)))
            found = []
            for seed in range(seeds):
                case = Scenario(answer, plant, start=1.2, target=0.49, steps=150)
                kept = errors_from_entry(simulate(config, case, seed), 0.2)
                found.append((np.mean(np.abs(kept) <= 0.2), np.sqrt(np.mean(kept**2)), 1 + kept.min(), 1 + kept.max()))
            near, rms, least, most = np.mean(found, axis=0)
            lines.append([answer, f"{kp:g}", f"{near:.0%}", f"{rms:.2f}", f"{least:.2f}", f"{most:.2f}"])
    return markdown_table(["SmolLM2, if it answers with", "kp", "within 20 %", "RMS", "least H / H*", "most"], lines)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: RMS error and variation per scenario and controller, then the other figures."""
    forms = {
        "in band": "{time_in_band:.0%}",
        "RMS": "{rms:.3f}",
        "overshoot": "{overshoot:.2f}",
        "settling": "{settling:.0f}",
        "oscillation": "{oscillation:.1f}",
        "mean abs d u": "{variation:.4f}",
    }
    lines = [
        [scenario, controller, *(form.format(**figures) for form in forms.values())]
        for scenario, by_controller in results.items()
        for controller, figures in by_controller.items()
    ]
    return markdown_table(["scenario", "controller", *forms], lines)


def main() -> None:
    """Measure all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--reach", action="store_true", help="only what could be told of targets out of reach")
    parser.add_argument("--collapse", action="store_true", help="only entropy that falls fast")
    parser.add_argument("--late", action="store_true", help="only a bonus that is felt late")
    parser.add_argument("--drawn", type=int, help="only so many plants drawn at random")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/controllers.json"))
    arguments = parser.parse_args()
    if arguments.reach:
        print(reach_table(arguments.seeds), "", bound_table(arguments.seeds), sep="\n")
        return
    if arguments.drawn:
        cases = drawn(arguments.drawn)
        untold = {
            name: replace(config, actuator="reweight") for name, config in CONTROLLERS.items() if config.command_min
        }
        print(drawn_table(cases, CONTROLLERS), "", "Delays that the law is not told:", "", sep="\n")
        print(drawn_table([late(case) for case in cases], untold))
        return
    if arguments.late:
        print(late_table(arguments.seeds))
        return
    if arguments.collapse:
        print(collapse_table(arguments.seeds))
        return
    results = {
        scenario: {controller: measure(scenario, controller, arguments.seeds) for controller in CONTROLLERS}
        for scenario in SCENARIOS
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1))
    print(table(results))
    print()
    print(reach_table(arguments.seeds))


if __name__ == "__main__":
    main()
