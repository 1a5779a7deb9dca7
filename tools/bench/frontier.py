"""Evaluates a finished policy at other sampling temperatures: is a lower pass@1 only a hotter policy?

    python -m tools.bench.frontier runs/lab --methods grpo isentrope_reweight --temperatures 0.4 0.6 0.8 1.0

Evaluates the newest checkpoint of every run of a laboratory's folder on the held-out prompts. Prints a Markdown table
of pass@1 and pass@16 (mean and 95 % interval over seeds), and writes it with every figure to
<folder>/frontier.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

from launchers.lab.figures import cell_text, half_width, markdown_table
from launchers.lab.matrix import is_complete
from pipeline.config.load import load_config

FIGURES = {"1": "pass_at_1", "16": "pass_at_16"}


def evaluate(run: Path, temperatures: list[float]) -> dict:
    """pass@k of one run at each temperature."""
    import torch

    from launchers.run import assemble

    torch.set_num_threads(1)
    configs = {t: load_config(run / "config.yaml", [f"evaluation.temperature={t}"]) for t in temperatures}
    config = configs[temperatures[0]]
    found = {}
    with ExitStack() as stack:
        measure = assemble.evaluator(config, run, stack)
        for temperature, given in configs.items():
            figures = measure(given)["pass_at_k"]
            found[str(temperature)] = {k: figures[k]["value"] for k in FIGURES}
    return {"method": config.name, "seed": config.seed, "pass_at_k": found}


def table(results: list[dict], temperatures: list[float]) -> str:
    """One row per method, one column per temperature: pass@1 / pass@16."""
    by_method = defaultdict(list)
    for result in results:
        by_method[result["method"]].append(result["pass_at_k"])
    lines = []
    for method, runs in by_method.items():
        cells = []
        for t in map(str, temperatures):
            values = {name: [run[t][k] for run in runs] for k, name in FIGURES.items()}
            cells.append(", ".join(cell_text(name, mean(each), half_width(each)) for name, each in values.items()))
        lines.append([method, *cells])
    return markdown_table(["method", *(f"T = {t:g}: pass@1, pass@16" for t in temperatures)], lines)


def main() -> None:
    """Evaluate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="*", default=[], help="default: all")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = [path.parent for path in sorted(arguments.folder.glob("*/config.yaml")) if is_complete(path.parent)]
    names = {run: load_config(run / "config.yaml", check=False).name for run in runs}
    chosen = [run for run in runs if not arguments.methods or names[run] in arguments.methods]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        results = list(pool.map(partial(evaluate, temperatures=arguments.temperatures), chosen))
    text = table(results, arguments.temperatures)
    (arguments.folder / "frontier.md").write_text(text + "\n")
    (arguments.folder / "frontier.json").write_text(json.dumps(results, indent=1))
    print(text)


if __name__ == "__main__":
    main()
