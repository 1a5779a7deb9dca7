"""``isentrope plan run``: says what a run will do, what it will cost, and whether it can start."""

from __future__ import annotations

from pathlib import Path

import typer

from launchers.cli.arguments import MEAN_RESPONSE, NODES, OVERRIDES
from launchers.cli.terminal import say


def run(
    config: Path = typer.Option(
        ..., "--config", "-c", help="YAML file; looked up here, then among the packaged configs."
    ),
    overrides: list[str] = OVERRIDES,
    cluster: Path | None = typer.Option(None, "--cluster", help="Cluster file; without it, this machine."),
    nodes: int | None = NODES,
    mean_response: int = MEAN_RESPONSE,
) -> None:
    """Say in words what a run will do, step by step and node by node, and check that it can. Exits with 2 if it cannot.

    Example:

      isentrope plan run --config quickstart.yaml rollout.prompts_per_step=64
    """
    from launchers.plan.check_costs import overlap
    from launchers.plan.preflight import check
    from launchers.plan.setting import prepared
    from launchers.slurm.cluster import load_cluster, split_overrides

    of_run, of_cluster = split_overrides(overrides)
    described = load_cluster(cluster, of_cluster) if cluster else None
    with prepared(config, of_run, described, nodes=nodes, mean_response=mean_response) as setting:
        report = check(setting)
        lines = report.lines if report.problems else [*report.lines, *overlap(setting)]
    say("\n".join(lines))
    report.raise_problems()
