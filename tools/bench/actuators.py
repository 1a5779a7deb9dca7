"""Actuators and controllers side by side on the quickstart task, over several seeds; how the default was chosen.

    python tools/bench/actuators.py --seeds 0 1 2        # 57 runs of 200 steps, about 30 s each on one core
    python tools/bench/actuators.py --methods "pi + reweight" "pi + reweight, staleness 4"

Runs are in process (TP=1), kept under runs/actuators/ and not repeated when they are already complete. Prints a Markdown table
(mean and standard deviation over seeds) and writes it with the figures of every run to runs/actuators/table.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from pipeline.monitoring.events import EventLogError
from pipeline.monitoring.summary import summarize

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "grpo": ["entropy.controller=none"],
    "grpo, 120 steps": ["entropy.controller=none", "steps=120"],
    "pi + reweight": [],
    "pi + fc": ["entropy.actuator=fc"],
    "pi + tok": ["entropy.actuator=tok"],
    "pi + resample": ["entropy.actuator=resample"],
    "pi + entropy_bonus": ["entropy.actuator=entropy_bonus"],
    "pi + clip_cov": ["entropy.actuator=clip_cov"],
    "scope + resample": ["entropy.controller=scope", "entropy.actuator=resample", "entropy.positive_mean=samples"],
    "bang_bang + resample": ["entropy.controller=bang_bang", "entropy.actuator=resample"],
    **{f"pi + reweight, staleness {s}": [f"rollout.staleness={s}"] for s in (1, 2, 4)},
    **{f"pi + resample, staleness {s}": ["entropy.actuator=resample", f"rollout.staleness={s}"] for s in (1, 2, 4)},
    "skywork": ["entropy.controller=skywork", "entropy.actuator=entropy_bonus"],
    "aent (full entropy)": ["entropy.controller=aent", "entropy.actuator=entropy_bonus"],
    "entropic": ["entropy.controller=entropic", "entropy.actuator=high_prob"],
}
FIGURES = ("final_entropy", "time_in_band", "rms_error", "pass_at_1", "pass_at_16", "distinct_correct")
COMMON = [
    "runtime=inline",
    "learner.tensor_model_parallel_size=1",
    "monitoring.progress=false",
    "evaluation.at_start=false",
]


def run(out: Path, method: str, seed: int) -> dict:
    """The summary of one run, trained now unless it is there already."""
    run_dir = (
        out / f"{method.replace(' ', '').replace('+', '-').replace(',', '-').replace('(', '').replace(')', '')}-s{seed}"
    )
    try:
        done = summarize(run_dir)
    except EventLogError:
        overrides = [*COMMON, *METHODS[method], f"seed={seed}", "evaluation.every=0", f"run_dir={run_dir}"]
        command = [sys.executable, "-m", "launchers.cli.main", "train", "--config", "quickstart.yaml", *overrides]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        done = summarize(run_dir)
    extra = done["tokens"]["auxiliary"] / done["tokens"]["main"]
    return {"method": method, "seed": seed, "extra_tokens": extra, **{name: done[name] for name in FIGURES}}


def table(results: list[dict]) -> str:
    """Markdown: one row per method, mean and standard deviation over seeds."""
    names = [*FIGURES, "extra_tokens"]
    lines = ["| method | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for method in dict.fromkeys(r["method"] for r in results):
        rows = [r for r in results if r["method"] == method]
        cells = []
        for name in names:
            values = [r[name] for r in rows if r[name] is not None]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "actuators")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        for method in arguments.methods:
            results.append(run(arguments.out, method, seed))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    (arguments.out / "table.json").write_text(json.dumps(results, indent=1))
    (arguments.out / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
