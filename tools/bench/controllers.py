"""The controllers on the simulated plant, every scenario, many seeds.

    python -m tools.bench.controllers --seeds 32          # about a minute on one core

All laws get the same second rollout (actuator ``resample``) and the same limits, T+ from 0.6 to 1.6, so that laws are compared and not limits;
``pi, default`` is the default configuration, its own actuator and limits. Prints a Markdown table of means over seeds and writes
the figures to runs/bench/controllers.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.plant import SCENARIOS, Performance, performance, simulate

EQUAL = {"actuator": "resample", "command_min": 0.6, "command_max": 1.6}
CONTROLLERS = {
    "pi, default": EntropyConfig(),
    "pi": EntropyConfig(controller="pi", **EQUAL),
    "scope v7": EntropyConfig(controller="scope", **EQUAL),
    "bang_bang": EntropyConfig(controller="bang_bang", **EQUAL),
}
FIGURES = tuple(Performance.__dataclass_fields__)


def measure(scenario: str, controller: str, seeds: int) -> dict[str, float]:
    """Means over seeds 0 to ``seeds`` - 1 of every figure of ``Performance``."""
    case = SCENARIOS[scenario]
    delay = case.plant.delay
    runs = [asdict(performance(simulate(CONTROLLERS[controller], case, seed, delay))) for seed in range(seeds)]
    return {name: float(np.mean([run[name] for run in runs])) for name in FIGURES}


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


if __name__ == "__main__":
    main()
