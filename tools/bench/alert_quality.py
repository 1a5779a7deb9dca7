"""Measures whether the shipped alert rules find real faults and stay quiet otherwise.

    python -m tools.bench.alert_quality  # simulated runs, 20 seeds a fault
    python -m tools.bench.alert_quality --recorded runs/quickstart/pi runs/quickstart/grpo
    python -m tools.bench.alert_quality --train 3  # first trains so many seeds of PI and of GRPO

Precision of a rule: of its alerts over all runs, the share that were right (its fault was there). Recall of a fault:
the share of runs in which an expected rule spoke after it began; the delay is the median until then. Every run is made
from its seed: nothing depends on the machine but the last lines, the time that the engine takes for a step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.config.schema import AlertsConfig
from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.alerts.engine import AlertEngine
from pipeline.monitoring.alerts.replay import replay_run
from pipeline.monitoring.alerts.rules import constants_of, load_rules
from pipeline.monitoring.events import read_events
from tools.bench.alert_traces import FAULTS, HEALTHY, ONSET, STEPS, Fault, config_of, noise_of, trace

ROOT = Path(__file__).resolve().parents[2]
TRAINED = {"PI": "quickstart.yaml", "GRPO": "recipe/pm4_grpo.yaml"}


@dataclass
class Score:
    """Of one rule."""

    right: int = 0
    wrong: int = 0
    examples: list[str] = field(default_factory=list)


def run_alerts(seed: int, overrides: Sequence[str] = (), fault: Fault | None = None) -> list[tuple[Alert, float]]:
    """The alerts that begin in one simulated run, each with the seconds since the fault began."""
    config = config_of(*overrides, *(fault.overrides if fault else ()))
    engine = AlertEngine(load_rules(AlertsConfig()), constants_of(config))
    alerts, onset = [], 0.0
    for each in trace(seed, overrides, fault):
        if isinstance(each, tuple):
            found = engine.tick(*each)
        else:
            if each["kind"] == "step" and each["step"] == ONSET - 1:
                onset = each["time"]
            found = engine.observe(each)
        alerts += [(alert, alert.time - onset) for alert in found if alert.state == "begin"]
    return alerts


def healthy(seeds: int, scores: dict[str, Score]) -> list[dict[str, Any]]:
    """Runs with nothing wrong: every alert is a false one."""
    rows = []
    for name, overrides in HEALTHY.items():
        counts: Counter[str] = Counter()
        for seed in range(seeds):
            for alert, _ in run_alerts(seed, overrides):
                counts[alert.rule] += 1
                scores[alert.rule].wrong += 1
                scores[alert.rule].examples.append(f"{name}, seed {seed}, step {alert.step}: {alert.reason[:90]}")
        rows.append({"run": name, "steps": seeds * STEPS, "false": dict(counts)})
    return rows


def injected(seeds: int, scores: dict[str, Score]) -> list[dict[str, Any]]:
    """Runs with one fault each."""
    rows = []
    for fault in FAULTS:
        delays, first = [], Counter[str]()
        for seed in range(seeds):
            alerts = run_alerts(1000 + seed, (), fault)
            right = {*fault.expected, *fault.allowed}
            for alert, since in alerts:
                score = scores[alert.rule]
                if alert.rule in right and since >= 0:
                    score.right += 1
                else:
                    score.wrong += 1
                    score.examples.append(f"{fault.name}, seed {seed}, step {alert.step}: {alert.reason[:90]}")
            hits = [(alert, since) for alert, since in alerts if alert.rule in fault.expected and since >= 0]
            if hits:
                first[hits[0][0].rule] += 1
                delays.append((hits[0][0].step - ONSET, hits[0][1]))
        rows.append(
            {
                "fault": fault.name,
                "recall": len(delays) / seeds,
                "first": dict(first),
                "steps": median(steps for steps, _ in delays) if delays else None,
                "minutes": median(since for _, since in delays) / 60 if delays else None,
            }
        )
    return rows


def recorded(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """What the rules say of real runs, and their noise."""
    rows = []
    for run in runs:
        entropy, reward = noise_of(run)
        said = [f"{firing.begin.rule} at {firing.begin.step}" for firing in replay_run(run).firings]
        rows.append(
            {"run": f"{run.parent.name}/{run.name}", "alerts": said, "ln H noise": entropy, "reward noise": reward}
        )
    return rows


def microseconds_per_step() -> tuple[float, float]:
    """Of CPU time: every rule over one step, and one look at the time."""
    events = [each for each in trace(0) if not isinstance(each, tuple)]
    engine = AlertEngine(load_rules(AlertsConfig()), constants_of(config_of()))
    started = time.process_time()
    for event in events:
        engine.observe(event)
    steps = time.process_time() - started
    started = time.process_time()
    for index in range(STEPS):
        engine.tick(events[-1]["time"] + index)
    return 1e6 * steps / STEPS, 1e6 * (time.process_time() - started) / STEPS


def train(seeds: int, out: Path) -> list[Path]:
    """Real runs of the 100k-parameter model, 300 steps in one process each; those that exist are kept."""
    runs = []
    for seed in range(seeds):
        for name, config in TRAINED.items():
            run = out / f"{name}-{seed}"
            runs.append(run)
            if (run / "report.html").exists():
                continue
            settings = [
                "runtime=inline",
                "learner.tensor_model_parallel_size=1",
                "steps=300",
                "monitoring.progress=false",
            ]
            settings += ["evaluation.every=0", "evaluation.at_start=false", "evaluation.at_end=false"]
            command = [sys.executable, "-m", "launchers.cli.main", "train", "--config", config, *settings]
            subprocess.run(
                [*command, f"seed={seed}", f"run_dir={run}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
    return runs


def show(result: dict[str, Any]) -> None:
    """The tables of docs/monitoring.md, in Markdown."""
    print(f"\n| nothing wrong ({result['seeds']} seeds) | steps | false alerts |\n|---|---|---|")
    for row in result["healthy"]:
        print(f"| {row['run']} | {row['steps']:,} | {_counts(row['false']) or 'none'} |")
    print("\n| fault at step 310 | found | first said by | delay, steps | delay, minutes |\n|---|---|---|---|---|")
    for row in result["injected"]:
        at = "-" if row["steps"] is None else f"{row['steps']:.0f} | {row['minutes']:.0f}"
        print(f"| {row['fault']} | {row['recall']:.0%} | {_counts(row['first'])} | {at} |")
    print("\n| rule | severity | raised when | right | wrong | precision |\n|---|---|---|---|---|---|")
    for row in result["rules"]:
        precision = "-" if row["precision"] is None else f"{row['precision']:.0%}"
        print(
            f"| `{row['rule']}` | {row['severity']} | {row['when']} | {row['right']} | {row['wrong']} | {precision} |"
        )
    if result["recorded"]:
        print("\n| recorded run | alerts | noise of ln H | noise of the reward |\n|---|---|---|---|")
    for row in result["recorded"]:
        said = ", ".join(row["alerts"]) or "none"
        print(f"| {row['run']} | {said} | {row['ln H noise']:.3f} | {row['reward noise']:.3f} |")
    print(
        f"\nCPU time of every rule: {result['microseconds'][0]:.0f} µs a step, "
        f"{result['microseconds'][1]:.0f} µs a look at the time"
    )
    if result["step_seconds"]:
        share = result["microseconds"][0] / 1e6 / result["step_seconds"]
        print(f"that is {share:.2%} of the recorded runs' median step of {1000 * result['step_seconds']:.0f} ms")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def main() -> None:
    """Measure, print, and with --json also write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="runs of each kind")
    parser.add_argument("--recorded", type=Path, nargs="*", default=[], help="folders of real runs")
    parser.add_argument("--train", type=int, default=0, metavar="SEEDS", help="train real runs first, and judge them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "alerts", help="folder of --train")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--wrong", action="store_true", help="also print every false alert")
    arguments = parser.parse_args()
    rules = load_rules(AlertsConfig())
    scores = {rule.name: Score() for rule in rules}
    runs = [*arguments.recorded, *train(arguments.train, arguments.out)]
    seconds = [e["seconds"]["total"] for run in runs for e in read_events(run / "events.jsonl") if e["kind"] == "step"]
    result: dict[str, Any] = {
        "seeds": arguments.seeds,
        "healthy": healthy(arguments.seeds, scores),
        "injected": injected(arguments.seeds, scores),
        "recorded": recorded(runs),
        "microseconds": microseconds_per_step(),
        "step_seconds": median(seconds) if seconds else None,
    }
    result["rules"] = [
        {
            "rule": rule.name,
            "severity": rule.config.severity,
            "when": rule.describe(),
            "right": (score := scores[rule.name]).right,
            "wrong": score.wrong,
            "precision": score.right / (score.right + score.wrong) if score.right + score.wrong else None,
        }
        for rule in sorted(rules, key=lambda rule: rule.name)
    ]
    show(result)
    if arguments.wrong:
        print(*(f"{name}: {example}" for name, score in scores.items() for example in score.examples), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
