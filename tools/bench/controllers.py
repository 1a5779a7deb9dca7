"""Compares the controllers on the simulated plant: every scenario, many seeds.

    python -m tools.bench.controllers --seeds 32          # about a minute on one core

All laws get the same second rollout (actuator ``resample``) and the same limits, T+ from 0.6 to 1.6, so that laws are
compared and not limits; ``pi, default`` is the default configuration, its own actuator and limits. Prints a Markdown
table of means over seeds and writes the figures to runs/bench/controllers.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.plant import SCENARIOS, Performance, Plant, Scenario, performance, simulate

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
    columns = ["target", "controller", "called out of reach", "within 30 steps at the limit", "median steps"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for scenario in (*OUT_OF_REACH, *STEEP, SCENARIOS["nominal"]):
        for controller in ("pi", "pi, repeated"):
            steps = [first_warning(scenario, seed, controller)[0] for seed in range(seeds)]
            found = [number for number in steps if number is not None]
            soon = sum(number <= 30 for number in found) / seeds
            median = f"{np.median(found):.0f}" if found else "-"
            lines.append(f"| {scenario.name} | {controller} | {len(found) / seeds:.0%} | {soon:.0%} | {median} |")
    return "\n".join(lines)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: RMS error and variation per scenario and controller, then the other figures."""
    lines = [
        "| scenario | controller | in band | RMS | overshoot | settling | oscillation | mean abs d u |",
        "|---" * 8 + "|",
    ]
    for scenario, by_controller in results.items():
        for controller, f in by_controller.items():
            lines.append(
                f"| {scenario} | {controller} | {f['time_in_band']:.0%} | {f['rms']:.3f} | {f['overshoot']:.2f} | "
                f"{f['settling']:.0f} | {f['oscillation']:.1f} | {f['variation']:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/controllers.json"))
    arguments = parser.parse_args()
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
