"""``isentrope launch``: starts a run as a Slurm job, or on this machine with supervision."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers.cli.arguments import CONFIG, MEAN_RESPONSE, NODES, OVERRIDES, either
from launchers.cli.jobs_cmd import follow
from launchers.cli.terminal import say
from pipeline.config.errors import ConfigError

if TYPE_CHECKING:
    from launchers.plan.setting import Setting

app = typer.Typer(help="Start a training run: on a Slurm cluster, or here with supervision.", no_args_is_help=True)

RESUME = typer.Option(None, "--resume", metavar="RUN", help="Run folder to continue, with its own config.")
DRY_RUN = typer.Option(
    False, "--dry-run", help="Print the plan, the resolved config and the job script; start nothing."
)


@app.command()
def slurm(
    config: Path | None = CONFIG,
    overrides: list[str] = OVERRIDES,
    cluster: Path = typer.Option(..., "--cluster", help="Cluster file, e.g. a copy of configs/cluster/plain.yaml."),
    nodes: int | None = NODES,
    resume: Path | None = RESUME,
    dry_run: bool = DRY_RUN,
    mean_response: int = MEAN_RESPONSE,
    detach: bool = typer.Option(
        False, "--detach", help="Return when the job is in the queue, instead of following it."
    ),
) -> None:
    """Submit a run as a Slurm job through nemo-run.

    It saves before its time is up, requeues itself and goes on until done.

    Overrides that begin with `cluster.` mean the cluster file.

    Examples:

      isentrope launch slurm --config my.yaml --cluster my_cluster.yaml \\
        --nodes 8 --dry-run

      isentrope launch slurm --config my.yaml --cluster my_cluster.yaml \\
        steps=500 cluster.walltime=02:00:00 --detach
    """
    from launchers.plan.setting import prepared
    from launchers.slurm.cluster import load_cluster, split_overrides
    from launchers.slurm.worktree import collect
    from pipeline.config.load import to_yaml

    of_run, of_cluster = split_overrides(overrides)
    described = load_cluster(cluster, of_cluster)
    either(config, resume, "--resume RUN")
    with prepared(
        config, of_run, described, nodes=nodes, resume=resume, submits=not dry_run, mean_response=mean_response
    ) as setting:
        _show(setting)
    from launchers.slurm import jobs
    from launchers.slurm.submit import Launch, check_partition, script, submit

    launch = Launch(setting.config, described, setting.nodes, setting.run_dir, collect())
    say(f"code: {launch.code.described}")
    if dry_run:
        say(f"\n--- config.yaml\n{to_yaml(setting.config)}\n--- job script\n{script(launch)}")
        return
    check_partition(launch, setting.shell)
    began = time.time()
    submitted = submit(launch)
    run_dir = setting.run_dir
    remembered = jobs.remember(submitted.job_ids, launch.job_name, run_dir, submitted.experiment, described.ssh, began)
    first = remembered[0]
    say(f"submitted: job {', '.join(submitted.job_ids)}, log {first.log}")
    say(f"watch it with: isentrope jobs status {first.job_id}; isentrope jobs logs {first.job_id} --follow")
    if not detach:
        follow(remembered[-1])


@app.command()
def local(
    config: Path | None = CONFIG,
    overrides: list[str] = OVERRIDES,
    resume: Path | None = RESUME,
    dry_run: bool = DRY_RUN,
    attempts: int = typer.Option(
        3, min=1, help="Attempts in a row that complete no further step, after which it stops."
    ),
) -> None:
    """Train on this machine; a run that breaks off is resumed from its newest checkpoint.

    Examples:

      isentrope launch local --config configs/quickstart.yaml steps=50
    """
    from launchers.plan.setting import prepared
    from launchers.supervise.local import supervise
    from pipeline.config.load import to_yaml

    either(config, resume, "--resume RUN")
    with prepared(config, overrides, None, resume=resume, submits=not dry_run) as setting:
        _show(setting)
    resolved, run_dir = setting.config, setting.run_dir
    if dry_run:
        say(f"\n--- config.yaml\n{to_yaml(resolved)}")
        return
    verdict, reason = supervise(resolved, run_dir, attempts)
    say(f"{verdict}: {reason}", err=True)
    if verdict in ("saved", "cancelled"):
        say(f"go on with: isentrope launch local --resume {shlex.quote(str(run_dir))}", err=True)
    if verdict in ("failed", "cancelled"):
        raise typer.Exit(1)


def _show(setting: Setting) -> None:
    """The plan. Raises ``ConfigError`` with everything that stops the launch."""
    from launchers.plan.preflight import check

    if setting.config.runtime != "ray":
        remedy = "set runtime=ray, or use `isentrope train`"
        raise ConfigError("runtime", setting.config.runtime, "a launched run needs Ray", remedy)
    report = check(setting)
    say("\n".join(report.lines))
    report.raise_problems()
