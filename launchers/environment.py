"""The environment variables of the launchers: the only module that reads or sets them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SlurmJob:
    """The Slurm job around this process."""

    id: str
    restart: int  # how often it was requeued
    nodes: tuple[str, ...]  # as Slurm abbreviates them: n[1-2]


def slurm_job() -> SlurmJob:
    """The job around this process. Raises ``KeyError`` outside one."""
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return SlurmJob(os.environ["SLURM_JOB_ID"], restart, (os.environ["SLURM_JOB_NODELIST"],))


def ray_address() -> str | None:
    """Address (host:port) of the Ray cluster to join, from ``RAY_ADDRESS``; None: start one on this machine."""
    return os.environ.get("RAY_ADDRESS") or None


def guard_ray_token() -> None:
    """See that nobody else on this machine can read Ray's token, with which anybody may run code in the cluster.

    Ray's servers listen on every interface and have no key that says otherwise: the token is what keeps others out. Ray
    makes the file where there is none, readable by all.
    """
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


def nodes() -> int:
    """Nodes of the Slurm job around this process; 1 outside a job."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def node_index() -> int:
    """This node's number in the Slurm step around this process, from 0."""
    return int(os.environ.get("SLURM_NODEID", "0"))


def cpus() -> int:
    """CPUs of this node that the Slurm job, or else this process, may use."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE", len(os.sched_getaffinity(0))))


def default(name: str, value: str) -> None:
    """Set ``name`` for this process and its children, unless the user did."""
    os.environ.setdefault(name, value)


def unset(defaults: Mapping[str, str]) -> dict[str, str]:
    """Those of ``defaults`` that the user did not set."""
    return {name: value for name, value in defaults.items() if name not in os.environ}


def child(**changes: str) -> dict[str, str]:
    """This process's environment with ``changes``, for a child process."""
    return {**os.environ, **changes}


def values(names: Sequence[str]) -> dict[str, str]:
    """The variables of ``names`` that are set and not empty."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def cache_home() -> Path:
    """Where copies may be kept that can be made again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def nemo_run_home() -> Path:
    """Where nemo-run keeps its records (its own rule)."""
    return Path(os.environ.get("NEMORUN_HOME", "~/.nemo_run")).expanduser()
