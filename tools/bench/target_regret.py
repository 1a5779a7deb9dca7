"""Measures what the band that `isentrope entropy target` names costs, against the best of the fixed targets of a suite.

Reads the runs of a suite that holds several fixed bands (`target`, `target_cd3`, `target_chain_sum`, `pm4_weak`).

    python -m tools.bench.target_regret runs/lab/target          # after: isentrope lab run --suite target --out ...
    python -m tools.bench.target_regret runs/lab/pm4_weak --methods grpo held_20 held_25 held_30 held_40 held_50

For each seed and k: what the run without control names, what a run held there would have (pass@k of the fixed targets,
interpolated over their entropy; without control where the advice is that none is needed), and how much less that is
than the best fixed target of the same seed. *as good from* is the highest entropy that the rule calls as good. Rows of
bands that a run found by itself (``schedule: auto``) have the entropy and the pass@k of that run. pass@k is the mean of
a run's last three evaluations. The best of several noisy figures is too good by chance, so regret is above 0 even for a
perfect rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launchers.lab.figures import half_width, markdown_table
from pipeline.entropy.target import recommend
from pipeline.monitoring.summary import RunHistory, pass_at, read_run
from pipeline.monitoring.target_data import measured

KS = (1, 4, 16)
Found = tuple[str, float, float]  # row, entropy in nats (NaN: no control), regret in pass@k


def value(run: RunHistory, k: int) -> float:
    """pass@k, the mean of the last three evaluations."""
    return float(np.mean([pass_at(evaluation, k)[0] for evaluation in run.evaluations[-3:]]))


def entropy(run: RunHistory) -> float:
    """Mean of the last steps, nats per token."""
    return run.series.recent_mean("entropy/controlled")


def regrets(runs: Sequence[RunHistory], k: int) -> list[Found]:
    """Of one seed's runs: the rule's, and that of each run that found its band."""
    alone = next(run for run in runs if run.is_baseline)
    held = sorted((run for run in runs if not run.is_baseline and _is_fixed(run)), key=entropy)
    curve = [alone, *(run for run in held if entropy(run) > entropy(alone))]
    best = max(value(run, k) for run in held)
    rule = recommend(measured(alone, k), k)

    def regret(target: float) -> float:
        there = np.interp(target, [entropy(run) for run in curve], [value(run, k) for run in curve])
        return best - float(there)

    if rule.kept_to_the_end:
        found = [("entropy target", float("nan"), best - value(alone, k))]
    else:
        found = [("entropy target", rule.entropy, regret(rule.entropy))]
    found.append(("as good from", rule.highest, regret(rule.highest)))
    auto = [run for run in runs if not run.is_baseline and not _is_fixed(run)]
    return found + [(run.config.name, entropy(run), best - value(run, k)) for run in auto]


def _is_fixed(run: RunHistory) -> bool:
    return run.config.entropy.band.schedule == "constant"


def main() -> None:
    """Read, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", help="one run without control and those that hold bands; default: all")
    options = parser.parse_args()
    runs = [read_run(path.parent) for path in sorted(options.folder.glob("*/events.jsonl"))]
    wanted = options.methods or {run.config.name for run in runs}
    runs = [run for run in runs if run.status == "completed" and run.config.name in wanted]
    seeds = sorted({run.config.seed for run in runs})
    lines = []
    for k in KS:
        rows: dict[str, list[Found]] = {}
        for seed in seeds:
            for found in regrets([run for run in runs if run.config.seed == seed], k):
                rows.setdefault(found[0], []).append(found)
        for name, found_there in rows.items():
            lost = [regret for _, _, regret in found_there]
            named = " ".join("no control" if np.isnan(at) else f"{at:.3f}" for _, at, _ in found_there)
            each = " ".join(f"{regret:+.3f}" for regret in lost)
            lines.append([str(k), name, named, each, f"{np.mean(lost):+.3f} ± {half_width(lost):.3f}"])
    print(markdown_table(["k", "row", "names, by seed", "regret, by seed", "regret"], lines))


if __name__ == "__main__":
    main()
