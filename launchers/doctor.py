"""Checks whether this machine can train: package versions, devices, shared memory, ports, disk.

No configuration is needed.

Imports nothing of Isentrope: a launch sends this file alone to the cluster's Python (``launchers.plan.site``).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipeline.units import GIB

OK, NOTE, BAD = "ok", "note", "bad"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "ray", "sglang", "nemo-run")
# As pyproject.toml has it, which does not travel with this file (a test compares them).
SERVED = {
    "torch": ">=2.11",
    "megatron-core": ">=0.16.1,<0.20",
    "transformer-engine": ">=2.20,<2.21",
    "transformers": ">=5.0",
    "ray": ">=2.50",
    "sglang": ">=0.5.17,<0.6",
}
PINNED = (("sglang", "torch"), ("sglang", "transformers"))  # whose versions its owner declares
ADAPTERS = Path("/sys/class/infiniband")  # the kernel's list of InfiniBand and RoCE adapters
VERBS = "libibverbs.so.1"  # what NCCL loads to use them


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; ``remedy`` is empty when nothing is wrong."""

    level: str  # ok | note | bad
    subject: str
    words: str
    remedy: str = ""

    def render(self) -> str:
        """One line, and one for the remedy."""
        line = f"{self.level:4} {self.subject}: {self.words}"
        return f"{line}\n     remedy: {self.remedy}" if self.remedy else line


def examine(folder: Path) -> list[Finding]:
    """Run every check in order; ``folder`` is where runs would be written."""
    looks: Sequence[Callable[[], Iterator[Finding]]] = (
        lambda: environment(_cuda()),
        _gpus,
        _fabric,
        _memory,
        _ports,
        lambda: _disk(folder),
        _slurm,
    )
    return [finding for look in looks for finding in look()]


def environment(gpus: bool) -> Iterator[Finding]:
    """Python and the packages; ``gpus``: whether they are to compute on GPUs."""
    yield from _python()
    yield from _versions(gpus)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if Version(version) < Version("3.11"):
        yield Finding(BAD, "python", version, "use Python 3.11 or newer")
    else:
        yield Finding(OK, "python", f"{version} on {socket.gethostname()}")


def _versions(gpus: bool) -> Iterator[Finding]:
    found = {name: version for name in PACKAGES if (version := _version(name))}
    missing = {"torch", "megatron-core", "ray"} - found.keys()
    for name in sorted(missing):
        yield Finding(BAD, name, "not installed", f"pip install {name}")
    yield Finding(OK, "versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    for name, wanted in SERVED.items():
        if name in found and Version(found[name]).public not in SpecifierSet(wanted):
            remedy = f"install {name}{wanted}, or another isentrope"
            yield Finding(BAD, name, f"{found[name]} is installed, isentrope wants {wanted}", remedy)
    for owner, name in PINNED:
        pin = _wanted(owner, name)
        if pin and name in found and Version(found[name]).public not in pin.specifier:
            level = BAD if gpus else NOTE  # its CPU paths are less particular
            words = f"{found[name]} is installed, {owner} {_version(owner)} wants {pin.specifier}"
            yield Finding(level, name, words, f"install {name}{pin.specifier}, or another {owner}")
    if "transformer-engine" not in found and gpus:
        yield Finding(NOTE, "transformer-engine", "not installed", "install it for FP8 and fused layers")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        words = f"none visible (torch {torch.__version__}, {f'built for CUDA {built}' if built else 'built for CPUs'})"
        remedy = "check nvidia-smi and CUDA_VISIBLE_DEVICES" if built else ""
        yield Finding(NOTE if built else OK, "GPUs", words, remedy)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        words = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        busy = free < 0.9 * total
        yield Finding(NOTE if busy else OK, f"GPU {index}", words, "another process uses it" if busy else "")


def _fabric() -> Iterator[Finding]:
    """Whether NCCL would find the InfiniBand adapters that the kernel knows.

    The check takes the same two steps as NCCL, which falls back to TCP without them.
    """
    known = sorted(path.name for path in ADAPTERS.glob("*"))
    if not known:
        yield Finding(OK, "InfiniBand", "no adapters")
        return
    remedy = "apt install libibverbs1 ibverbs-providers librdmacm1: NCCL would cross nodes by TCP"
    try:
        found = _verbs_devices()
    except OSError as error:
        yield Finding(BAD, "InfiniBand", f"{', '.join(known)}, but no library to use them ({error})", remedy)
        return
    words = f"{', '.join(known)}; {VERBS} finds {found} of them"
    yield Finding(OK, "InfiniBand", words) if found else Finding(BAD, "InfiniBand", words, remedy)


def _verbs_devices() -> int:
    """How many adapters ``libibverbs`` finds, for which it needs their providers.

    Raises ``OSError`` where it is missing.
    """
    verbs, count = ctypes.CDLL(VERBS), ctypes.c_int(0)
    verbs.ibv_get_device_list.restype = ctypes.c_void_p
    if devices := verbs.ibv_get_device_list(ctypes.byref(count)):
        verbs.ibv_free_device_list(ctypes.c_void_p(devices))
    return count.value


def _memory() -> Iterator[Finding]:
    shared = shutil.disk_usage("/dev/shm")
    words = f"{shared.free / GIB:.1f} of {shared.total / GIB:.1f} GiB free in /dev/shm"
    if shared.total < GIB:
        remedy = "start the container with more (docker --shm-size, --ipc=host): weights and batches travel through it"
        yield Finding(BAD, "shared memory", words, remedy)
    else:
        yield Finding(OK, "shared memory", words)


def _ports() -> Iterator[Finding]:
    """Ray's head listens between 20000 and 31999 (launchers/slurm/job.sh.j2), ranks on ephemeral ports."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    words = f"ephemeral ports {low} to {high}"
    if low < 32000:
        remedy = "a job whose Ray port is taken is tried again; raise net.ipv4.ip_local_port_range above 32000"
        yield Finding(NOTE, "ports", f"{words} overlap with those of Ray's heads (20000 to 31999)", remedy)
    else:
        yield Finding(OK, "ports", words)
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        yield Finding(OK, "host name", socket.gethostname())
    except OSError:
        remedy = "add it to /etc/hosts; runs on one node do without"
        yield Finding(NOTE, "host name", f"{socket.gethostname()} does not resolve", remedy)


def _disk(folder: Path) -> Iterator[Finding]:
    above = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(above).free
    words = f"{free / GIB:.1f} GiB free in {above}"
    if free < GIB:
        yield Finding(BAD, "disk", words, "make room, or choose another run_dir")
    else:
        yield Finding(OK, "disk", words)


def _slurm() -> Iterator[Finding]:
    found = [name for name in ("sbatch", "srun", "scontrol", "sacct", "apptainer", "enroot") if shutil.which(name)]
    yield Finding(
        OK, "cluster tools", ", ".join(found) or "none (jobs can be submitted over SSH: `ssh` in the cluster file)"
    )


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _version(name: str) -> str:
    for candidate in (name, name.replace("-", "_"), f"{name}-cu12", f"{name}-cu13"):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _wanted(owner: str, name: str) -> Requirement | None:
    """What an installed ``owner`` declares about ``name``."""
    if not _version(owner):
        return None
    for text in importlib.metadata.requires(owner) or []:
        requirement = Requirement(re.sub(r";\s*extra == .*", "", text))
        if requirement.name.lower().replace("_", "-") == name:
            return requirement
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(finding) for finding in environment("gpus" in sys.argv)]))
