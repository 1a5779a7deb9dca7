"""Looks over the connection, before anything is sent, at what is installed and stored where the job will run."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launchers import doctor
from launchers.slurm.cluster import ClusterConfig
from launchers.slurm.jobs import CommandError, Shell
from pipeline.config.load import PACKAGED, resolve_path
from pipeline.config.schema import RunConfig

_LOOK = """
for path in {paths}; do
  if [ -d "$path" ]; then echo folder; elif [ -e "$path" ]; then echo file; else echo absent; fi
done
above={run_dir}
while [ ! -e "$above" ]; do above=$(dirname "$above"); done
echo "$above"
if [ -d "$above" ] && [ -w "$above" ]; then echo writable; else echo closed; fi
df -Pk "$above" | awk 'NR == 2 {{ print $4 * 1024 }}' OFMT=%.0f CONVFMT=%.0f
ls -d {model}/*.safetensors 2>/dev/null | wc -l
command -v {python} || echo absent
"""


class Elsewhere:
    """Small files of the machine that submits, copied into ``folder`` to be read here."""

    def __init__(self, run: Shell, folder: Path) -> None:
        self._run, self._folder = run, folder

    def copy(self, path: str) -> Path:
        """A copy of the file at ``path`` there; it does not exist where that does not."""
        target = self._folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(CommandError):
            target.write_text(self._run(f"cat {shlex.quote(path)}"))
        return target

    def model(self, path: str) -> Path:
        """A folder with the config.json of the model at ``path`` there, or the packaged model of that name."""
        packaged = resolve_path(path)
        if not Path(path).is_absolute() and packaged.is_relative_to(PACKAGED):
            return packaged
        return self.copy(f"{path}/config.json").parent


@dataclass(frozen=True)
class Site:
    """What one look found."""

    kinds: Mapping[str, str]  # of every path asked for: file | folder | absent
    above: str  # the run's folder, or the nearest one above it that exists
    writable: bool  # whether that can be written
    free: int  # bytes there
    weights: int  # files of weights in the model's folder
    python: bool  # whether the interpreter is there


def look(run: Shell, run_dir: Path, model: str, python: str, paths: Sequence[str]) -> Site:
    """Look with one command; paths are absolute. Raises ``CommandError`` where the shell there fails."""
    words = {
        "paths": shlex.join(paths) or "''",
        "run_dir": shlex.quote(str(run_dir)),
        "model": shlex.quote(model),
        "python": shlex.quote(python),
    }
    lines = run(_LOOK.format(**words)).splitlines()
    kinds = dict(zip(paths, lines, strict=False))
    above, writable, free, weights, found = lines[max(1, len(paths)) :][:5]
    return Site(kinds, above, writable == "writable", int(float(free)), int(weights), found != "absent")


def versions(run: Shell, python: str, *, gpus: bool) -> list[doctor.Finding]:
    """What ``isentrope doctor`` finds there about Python and the packages that must agree.

    The code need not be there yet.
    """
    source = base64.b64encode(Path(doctor.__file__).read_bytes()).decode()
    command = f"echo {source} | base64 -d | {shlex.quote(python)} - {'gpus' if gpus else ''}"
    try:
        found = json.loads(run(command).splitlines()[-1])
    except (CommandError, ValueError, IndexError) as error:
        last = (str(error).splitlines() or ["it said nothing"])[-1]
        remedy = "install requirements there (docs/cluster.md)"
        return [doctor.Finding(doctor.BAD, "versions", f"{python} cannot tell them: {last}", remedy)]
    return [doctor.Finding(**finding) for finding in found]


def packaged(path: str) -> bool:
    """Whether a path is found below ``configs/``, wherever the code is."""
    return not Path(path).is_absolute() and (PACKAGED / path).exists()


def needed_paths(config: RunConfig, cluster: ClusterConfig | None) -> list[tuple[str, str, str, str]]:
    """Key, path, kind (file, folder, any) and remedy of everything that must be there before a run starts."""
    found = []
    if not packaged(config.model.hf_path):
        found.append(
            ("model.hf_path", config.model.hf_path, "folder", "copy the model there, or give its folder there")
        )
    if config.data.source.kind == "jsonl":
        found.append(
            ("data.source.path", config.data.source.path, "file", "copy the data there, or give its path there")
        )
    if config.data.chat_template_file:
        found.append(("data.chat_template_file", config.data.chat_template_file, "file", "copy the template there"))
    if cluster is not None:
        found.append(("cluster.scratch", cluster.scratch, "folder", "make it, on a file system that every node shares"))
        image = cluster.container.image
        if image.startswith("/"):
            found.append(("cluster.container.image", image, "any", "import the image first (Dockerfile)"))
        sources = [mount.partition(":")[0] for mount in cluster.container.mounts]
        found += [("cluster.container.mounts", path, "any", "make it, or remove the mount") for path in sources]
    return found
