"""Turns a checked configuration into a queued Slurm job, through nemo-run.

nemo-run (0.11) brings the code and the job script to the cluster and submits it. Its Ray template needs pyxis and knows
nothing of requeueing, so the script is rendered from ``job.sh.j2`` here, by the same hook
(``SlurmExecutor.ray_template``). What nemo-run does not quote (environment variables, the job folder) is kept away from
it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from launchers import environment
from launchers.slurm.cluster import ClusterConfig, seconds
from launchers.slurm.jobs import CommandError, Shell, ssh_tunnel
from launchers.slurm.node import SHIPPED
from launchers.slurm.worktree import Code
from launchers.supervise.attempts import LAUNCH
from pipeline.config.errors import ConfigError, Problem
from pipeline.config.load import to_yaml
from pipeline.config.schema import RunConfig

if TYPE_CHECKING:
    from nemo_run import SlurmExecutor
    from nemo_run.core.tunnel.client import LocalTunnel, SSHTunnel

TITLE = "isentrope"  # of nemo-run's experiments: a folder name
TEMPLATE = Path(__file__).parent / "job.sh.j2"
SECRETS = "secrets.env"
REFUSALS = {  # what sbatch says, and the key that is to blame
    r"[Ii]nvalid partition": "partition",
    r"[Ii]nvalid account": "account",
    r"[Ii]nvalid qos": "qos",
    r"[Ii]nvalid feature": "constraint",
    r"time limit|TimeLimit": "walltime",
    r"[Nn]ode count|[Nn]ode configuration|nodes": "nodes",
    r"[Gg]eneric resource|\(gres\)": "gpus_per_node",
}


@dataclass(frozen=True)
class Launch:
    """Everything that a submission is made of.

    Raises ``ConfigError`` for a run folder that would break the job script.
    """

    config: RunConfig
    cluster: ClusterConfig
    nodes: int
    run_dir: Path  # on the cluster
    code: Code

    def __post_init__(self) -> None:
        if not str(self.run_dir).isprintable():
            remedy = "choose a folder whose path is one line without control characters"
            raise ConfigError("run_dir", str(self.run_dir), "its path would break a line of the job script", remedy)

    @property
    def job_name(self) -> str:
        """The name of all jobs of this run."""
        return re.sub(r"[^\w.+-]", "_", f"{TITLE}-{self.run_dir.name}")


@dataclass(frozen=True)
class Submitted:
    """Jobs in the queue."""

    experiment: str
    job_ids: tuple[str, ...]


def script(launch: Launch) -> str:
    """The job script, as it would be submitted; nothing is."""
    with _experiment(launch) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        found = sorted(Path(experiment._exp_dir).glob("*_sbatch.sh"))[0].read_text()
        shutil.rmtree(experiment._exp_dir)
    return found


def check_partition(launch: Launch, run: Shell) -> None:
    """Ask Slurm whether the partition can ever hold the job: sbatch would queue it for ever. Raises ``ConfigError``."""
    cluster = launch.cluster
    try:
        words = run(f"scontrol -o show partition {_quote(cluster.partition)}").split()
    except CommandError as error:
        remedy = "`sinfo` lists the partitions; to submit from another machine give `ssh` in the cluster file"
        raise ConfigError("cluster.partition", cluster.partition, f"Slurm says: {error}", remedy) from error
    said = dict(word.split("=", 1) for word in words if "=" in word)
    problems = []
    if launch.nodes > int(said.get("TotalNodes", launch.nodes)):
        what = f"partition {cluster.partition} has {said['TotalNodes']} nodes"
        problems.append(Problem("cluster.nodes", launch.nodes, what, "use fewer nodes (--nodes) or another partition"))
    longest = said.get("MaxTime", "UNLIMITED")
    if longest not in ("UNLIMITED", "INFINITE") and seconds(cluster.walltime) > seconds(longest):
        what = f"partition {cluster.partition} ends jobs after {longest}"
        problems.append(
            Problem("cluster.walltime", cluster.walltime, what, "lower it: the run is requeued until it is done")
        )
    if problems:
        raise ConfigError.of(problems)


def submit(launch: Launch) -> Submitted:
    """Ship the code, submit every job of the chain. Raises ``ConfigError`` with sbatch's own words when it refuses."""
    from invoke.exceptions import UnexpectedExit

    secrets = _secrets(launch.cluster)
    with _experiment(launch) as experiment:
        tunnel = experiment.jobs[0].executor.tunnel
        _prepare(tunnel, launch.run_dir / LAUNCH, secrets)
        try:
            experiment.run(detach=True)
        except UnexpectedExit as error:
            raise _refusal(launch.cluster, error.result.command, error.result.stderr.strip()) from error
        job_ids = tuple(job.handle.partition("://")[2].split("/")[1] for job in experiment.jobs)
    return Submitted(experiment._id, job_ids)


@contextmanager
def _experiment(launch: Launch) -> Iterator[Any]:
    """nemo-run's experiment with one task per job of the chain."""
    import nemo_run

    home = environment.nemo_run_home()
    if re.search(r"\s", str(home)):
        remedy = "set NEMORUN_HOME to a folder without spaces, on a file system that the nodes share"
        raise ConfigError("NEMORUN_HOME", str(home), "nemo-run does not quote this path", remedy)
    name = f"{TITLE}_{time.time_ns()}"
    base = Path(launch.cluster.ssh.job_dir) if launch.cluster.ssh.host else home / "experiments"
    with TemporaryDirectory(prefix="isentrope-") as folder:
        archive = Path(folder) / "code.tar.gz"
        launch.code.pack(archive, _beside(launch))
        experiment = nemo_run.Experiment(
            TITLE,
            id=name,
            log_level="ERROR",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        )
        with experiment:
            for number in range(1, launch.cluster.chain + 1):
                task = f"job-{number}"
                node = nemo_run.Script(
                    path="launchers.slurm.node",
                    m=True,
                    entrypoint=_quote(launch.cluster.python),
                    args=['"$run"', '"$attempt"', '"$address"'],  # the template's variables
                    metadata={"use_with_ray_cluster": True},  # selects SlurmExecutor.ray_template
                )
                executor = _executor(launch, archive, base / TITLE / name / task / "code")
                experiment.add(node, executor=executor, name=task)
            yield experiment


def _executor(launch: Launch, archive: Path, code: Path) -> SlurmExecutor:
    from nemo_run import SlurmExecutor
    from nemo_run.core.execution.slurm import SlurmJobDetails

    from launchers.slurm.packager import ArchivePackager

    cluster = launch.cluster
    extra: dict[str, Any] = {"dependency": "singleton"} if cluster.chain > 1 else {}
    return SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        nodes=launch.nodes,
        ntasks_per_node=1,
        cpus_per_task=cluster.cpus_per_node or None,
        gpus_per_node=cluster.gpus_per_node or None,
        mem=cluster.memory_per_node,
        exclusive=cluster.exclusive or None,
        time=cluster.walltime,
        qos=cluster.qos or None,
        constraint=cluster.constraint or None,
        signal=f"B:USR1@{cluster.save_before_s}",  # to the job script alone: Ray's processes would die of it
        additional_parameters=extra | cluster.sbatch,
        job_details=SlurmJobDetails(job_name=launch.job_name, folder=str(launch.run_dir / LAUNCH)),
        tunnel=_tunnel(cluster),
        packager=ArchivePackager(archive=str(archive)),
        setup_lines="\n".join(_prologue(launch, code)),
        ray_template=str(TEMPLATE),
        poll_estimated_start_time=False,
    )


def _tunnel(cluster: ClusterConfig) -> LocalTunnel | SSHTunnel:
    from nemo_run import LocalTunnel

    # Any other job_dir, and nemo-run copies nothing.
    return ssh_tunnel(cluster.ssh) if cluster.ssh.host else LocalTunnel(job_dir="")


def _prologue(launch: Launch, code: Path) -> Iterator[str]:
    """The lines of the job script that differ from run to run; every value quoted."""
    cluster, run_dir = launch.cluster, launch.run_dir
    yield f"run={_quote(run_dir)}"
    yield f"requeue={'yes' if cluster.requeue else 'no'}"
    yield f"save_before={cluster.save_before_s}"
    yield f"export PYTHONPATH={_quote(code)}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0"
    for name, value in cluster.env.items():
        yield f"export {name}={_quote(value)}"
    if cluster.secrets:
        yield f"set -a; . {_quote(run_dir / LAUNCH / SECRETS)}; set +a"
    yield from cluster.setup
    place, inside = _container(cluster, run_dir, code)
    yield f"place=({shlex.join(place)})"
    yield f"inside=({shlex.join(inside)})"


def _container(cluster: ClusterConfig, run_dir: Path, code: Path) -> tuple[list[str], list[str]]:
    """Arguments of srun, and the command that goes before Python."""
    container = cluster.container
    if container.runtime == "none":
        return [f"--chdir={code}"], []
    mounts = [f"{path}:{path}" for path in (cluster.scratch, str(run_dir), str(code.parent))] + container.mounts
    if container.runtime == "pyxis":
        image, bind = f"--container-image={container.image}", f"--container-mounts={','.join(dict.fromkeys(mounts))}"
        return [image, bind, f"--container-workdir={code}", "--no-container-mount-home"], []
    gpus = ["--nv"] if cluster.gpus_per_node else []
    binds = ["--bind", ",".join(dict.fromkeys(mounts))]
    return [f"--chdir={code}"], ["apptainer", "exec", *gpus, *binds, "--pwd", str(code), container.image]


def _beside(launch: Launch) -> dict[str, str]:
    """What travels with the code and is recorded in the run's folder; no secrets."""
    cluster = launch.cluster
    settings = {name: getattr(cluster, name) for name in ("attempts_without_progress", "object_store_gib")}
    described = asdict(replace(cluster, nodes=launch.nodes))
    texts = {
        "config.yaml": to_yaml(launch.config),
        "cluster.yaml": yaml.safe_dump(described, sort_keys=False),
        "launch.json": json.dumps(settings) + "\n",
        "code.json": launch.code.record(),
        "code.patch": launch.code.patch,
    }
    return {str(SHIPPED / name): text for name, text in texts.items()}


def _secrets(cluster: ClusterConfig) -> str:
    """Shell assignments, from this process's environment."""
    values = environment.values(cluster.secrets)
    lacking = [name for name in cluster.secrets if name not in values]
    if lacking:
        remedy = f"export {lacking[0]}=... before launching, or remove it from the cluster file"
        raise ConfigError("secrets", lacking, "not set in your environment", remedy)
    return "".join(f"{name}={_quote(value)}\n" for name, value in values.items())


def _prepare(tunnel: LocalTunnel | SSHTunnel, folder: Path, secrets: str) -> None:
    """The folder that sbatch will open its log in, and the secrets, readable by nobody else."""
    tunnel.run(f"mkdir -p {_quote(folder)}")
    if not secrets:
        return
    target = folder / SECRETS
    with TemporaryDirectory(prefix="isentrope-") as own:  # mode 700
        source = Path(own) / SECRETS
        source.write_text(secrets)
        # Made first with its mode, then filled: at no time can others read it.
        tunnel.run(f"rm -f {_quote(target)} && umask 077 && touch {_quote(target)}")
        source.chmod(0o600)
        tunnel.put(str(source), str(target))


def _refusal(cluster: ClusterConfig, command: str, said: str) -> ConfigError:
    """The refusal of sbatch, with the key that it is about, or of rsync."""
    if not command.startswith("sbatch"):
        remedy = (
            f"try `ssh {cluster.ssh.user}@{cluster.ssh.host}` once, so that its host key is known; "
            "rsync must be on both machines"
        )
        raise ConfigError("cluster.ssh.host", cluster.ssh.host, f"`{command.split()[0]}` failed: {said}", remedy)
    key = next((key for pattern, key in REFUSALS.items() if re.search(pattern, said)), "sbatch")
    value = getattr(cluster, key)
    words = "; ".join(line.removeprefix("sbatch: error: ") for line in said.splitlines())
    return ConfigError(
        f"cluster.{key}",
        value,
        f"sbatch refused the job: {words}",
        "correct the cluster file; `sinfo` and `sacctmgr show assoc` list what is allowed",
    )


def _quote(value: object) -> str:
    return shlex.quote(str(value))
