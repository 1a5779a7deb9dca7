"""What a launcher must know about a Slurm cluster: one YAML file, checked as strictly as a run's configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import MISSING

from pipeline.config.check import key_problems
from pipeline.config.errors import Problem
from pipeline.config.key import COUNT, NOT_NEGATIVE, Form, Range, key
from pipeline.config.load import load

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH|WEBHOOK|COOKIE", re.I)
# Passwords in URLs, webhooks.
_SECRET_VALUE = re.compile(r"://[^/\s@]*:[^/\s@]+@|://hooks\.|/webhooks?/|PRIVATE KEY", re.I)
OVERRIDE = "cluster."  # prefix of an override that means the cluster, not the run
VARIABLE = Form(r"[A-Za-z_]\w*", "not the name of an environment variable", "use letters, digits and '_'")


@dataclass
class SshConfig:
    """The login node, where the cluster is not this machine's."""

    host: str = key("", "login node to submit from over SSH; empty: this machine submits")
    user: str = key("", "user there")
    port: int = key(0, "port of its sshd; 0: what your ssh configuration says, or 22", range=Range(0, 2**16 - 1))
    identity: str = key("", "private key file; empty: the SSH agent, then a password", path="read")
    job_dir: str = key(
        "",
        "folder there, on a file system that the nodes share, for code and job scripts",
        form=Form(r"\S*", "nemo-run does not quote this path", "use one without spaces"),
    )


@dataclass
class ContainerConfig:
    """The container that every process of the run lives in."""

    runtime: str = key(
        "none",
        "what runs the image",
        choices={"none": "plain hosts", "pyxis": "enroot, srun --container-image", "apptainer": ""},
    )
    image: str = key("", "image: a registry name or .sqsh file (pyxis), a .sif file (apptainer)")
    mounts: list[str] = key(
        [],
        "further bind mounts, source:target; scratch and the code are mounted by themselves",
        form=Form(
            r"/[^:,]*(:/[^:,]*){0,1}(:[a-z]+)?", "not a mount", "write /source:/target, absolute, without ',' or ':'"
        ),
    )


@dataclass
class ClusterConfig:
    """A Slurm cluster, as one user may use it."""

    account: str = key(
        MISSING,
        "account that is charged (sbatch --account)",
        form=Form(r"\S+", "not a name", "ask `sacctmgr show assoc` for your accounts"),
    )
    partition: str = key(
        MISSING, "partition (sbatch --partition)", form=Form(r"\S+", "not a name", "ask `sinfo` for your partitions")
    )
    scratch: str = key(
        MISSING,
        "absolute folder that every node shares; runs go to <scratch>/runs/<name>-<date>",
        form=Form(r"/(?s:.*)", "not an absolute path", "name a folder that every node shares"),
    )
    nodes: int = key(
        0, "nodes of a job; 0: as many as the run needs; --nodes wins over it", range=NOT_NEGATIVE, unit="nodes"
    )
    gpus_per_node: int = key(
        8, "GPUs of a node that a job takes; 0: a cluster without GPUs", range=NOT_NEGATIVE, unit="GPUs"
    )
    gpu_gib: float = key(80.0, "memory of one GPU; the plan compares with it", range=Range(1), unit="GiB")
    gpu_tflops: float = key(
        989.0, "dense bf16 peak of one GPU (H100 SXM); for the plan's times", range=Range(1), unit="TFLOP/s"
    )
    gpu_memory_gb_s: float = key(
        3350.0, "memory bandwidth of one GPU (H100 SXM); for the plan's times", range=Range(1), unit="GB/s"
    )
    gpu_network_gb_s: float = key(
        50.0,
        "between GPUs of two nodes, one GPU, each way (400 Gbit/s); for the plan's weight sync",
        range=Range(0.001),
        unit="GB/s",
    )
    gpu_link_gb_s: float = key(
        400.0,
        "between GPUs of a node, one GPU, each way (NVLink 4); for the plan's weight sync",
        range=Range(0.001),
        unit="GB/s",
    )
    disk_gb_s: float = key(
        1.0, "what one node writes to scratch; for the plan's checkpoints", range=Range(0.001), unit="GB/s"
    )
    cpus_per_node: int = key(
        0, "CPUs of a node that a job takes; 0: all of an exclusive node", range=NOT_NEGATIVE, unit="CPUs"
    )
    memory_per_node: str = key(
        "0",
        "memory of a node that a job takes, e.g. 200G; 0: all of it; the plan compares a checkpoint's copy with it",
        form=Form(r"\d+([KMGTkmgt][Bb]?)?", "not a size as sbatch --mem takes it", "write e.g. 200G, or 0"),
    )
    exclusive: bool = key(True, "no other jobs on the nodes")
    walltime: str = key("04:00:00", "time limit of one attempt, [days-]hours:minutes:seconds")
    qos: str = key("", "quality of service (sbatch --qos)")
    constraint: str = key("", "node features (sbatch --constraint)")
    sbatch: dict[str, str | bool] = key(
        {}, "further sbatch options, e.g. {reservation: week7}; true: an option without a value"
    )
    container: ContainerConfig = key(ContainerConfig(), "container")
    python: str = key(
        "python3",
        "Python (inside the container, if any) with Isentrope's requirements installed",
        form=Form(r"(?s:.*)python(?s:.*)", "not a Python", "give the interpreter, e.g. /opt/venv/bin/python"),
    )
    env: dict[str, str] = key({}, "environment variables of the run; never secrets")
    secrets: list[str] = key(
        [],
        "names of environment variables to take from yours, e.g. [WANDB_API_KEY, HF_TOKEN]; travel in a "
        "file of mode 600",
        form=VARIABLE,
    )
    setup: list[str] = key([], "shell lines to run on the first node before anything else, e.g. module load cuda")
    save_before_s: int = key(
        300, "how long before the time limit the run saves and is requeued", range=NOT_NEGATIVE, unit="seconds"
    )
    requeue: bool = key(True, "put the job back into the queue when its time is up or it is lost")
    chain: int = key(
        1,
        "jobs submitted one behind the other, for clusters that forbid requeueing (requeue: false)",
        range=COUNT,
        unit="jobs",
    )
    attempts_without_progress: int = key(
        3, "attempts in a row that complete no further step, after which it stops", range=COUNT, unit="attempts"
    )
    object_store_gib: float = key(
        0.0,
        "Ray's object store on each node; 0: Ray's default",
        range=Range(0, 2**20, open_high=True),
        unit="GiB",
    )
    ssh: SshConfig = key(SshConfig(), "login node")


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The cluster of a YAML file, checked. ``overrides`` are ``key=value``, without the prefix.

    A name such as ``cluster/plain.yaml`` is also looked up among the packaged configurations.
    Raises ``ConfigError`` with every problem found.
    """
    return load(ClusterConfig, path, overrides, lambda cluster: list(problems_of(cluster)))


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the run, and of the cluster (without their prefix)."""
    mine = [text.removeprefix(OVERRIDE) for text in overrides if text.startswith(OVERRIDE)]
    return [text for text in overrides if not text.startswith(OVERRIDE)], mine


def seconds(walltime: str) -> int:
    """``[days-]hours:minutes:seconds`` in seconds. Raises ``ValueError``."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", walltime)
    if not match:
        raise ValueError(walltime)
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def memory_bytes(memory: str) -> int:
    """``memory_per_node`` in bytes, as sbatch reads it: in MiB without a unit."""
    text = memory.upper().removesuffix("B")
    number = text.rstrip("KMGT")
    return int(number) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[text.removeprefix(number)]


def problems_of(cluster: ClusterConfig) -> Iterator[Problem]:
    """Every rule that ``cluster`` breaks."""
    yield from _lines(asdict(cluster))
    yield from key_problems(cluster)
    yield from _time(cluster)
    yield from _container(cluster.container)
    yield from _environment(cluster)
    if cluster.chain > 1 and cluster.requeue:
        yield Problem(
            "chain", cluster.chain, "one job that requeues itself needs no chain", "set requeue: false, or chain: 1"
        )
    if not cluster.exclusive and not cluster.cpus_per_node:
        yield Problem("cpus_per_node", 0, "a shared node is not yours as a whole", "give a number, or exclusive: true")
    if cluster.ssh.host and not (cluster.ssh.user and PurePosixPath(cluster.ssh.job_dir).is_absolute()):
        yield Problem(
            "ssh", cluster.ssh.host, "a login node without user or absolute job_dir", "give ssh.user and ssh.job_dir"
        )
    if cluster.ssh.identity and not Path(cluster.ssh.identity).expanduser().is_file():
        yield Problem(
            "ssh.identity",
            cluster.ssh.identity,
            "no such file",
            "name your private key, or leave it empty for the agent",
        )


def _lines(values: Mapping[str, Any], section: str = "") -> Iterator[Problem]:
    """Texts that would break a line of the job script, and so run what follows; ``setup`` is there to be run."""
    for name, value in values.items():
        key = f"{section}{name}"
        if isinstance(value, dict):
            yield from _lines(value, f"{key}.")
        for text in (name, *(value if isinstance(value, list) else [value])):
            if key != "setup" and isinstance(text, str) and not text.isprintable():
                remedy = "write it on one line, without control characters"
                yield Problem(key, text, "holds a line break or another control character", remedy)


def _time(cluster: ClusterConfig) -> Iterator[Problem]:
    try:
        limit = seconds(cluster.walltime)
    except ValueError:
        yield Problem("walltime", cluster.walltime, "not a time", "write hours:minutes:seconds, e.g. 04:00:00")
        return
    if not 30 <= cluster.save_before_s < limit:
        remedy = "the step in progress and a checkpoint must fit into it, and it into walltime; 30 at least"
        yield Problem("save_before_s", cluster.save_before_s, f"not between 30 and walltime ({limit} s)", remedy)


def _container(container: ContainerConfig) -> Iterator[Problem]:
    if (container.runtime == "none") != (not container.image):
        remedy = "give both runtime (pyxis or apptainer) and image, or neither"
        yield Problem("container.image", container.image, f"does not fit container.runtime={container.runtime}", remedy)


def _environment(cluster: ClusterConfig) -> Iterator[Problem]:
    for name, value in cluster.env.items():
        if not re.fullmatch(VARIABLE.pattern, name):
            yield Problem("env", name, VARIABLE.problem, VARIABLE.remedy)
        if _SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value)):
            remedy = f"move {name} to `secrets`, which names it and takes its value from your environment"
            yield Problem("env", name, "looks like a secret, and env is written into scripts and logs", remedy)
