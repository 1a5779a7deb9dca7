"""Checkpoints: one folder, one manifest, complete or absent.

A checkpoint is written into ``.writing-step-N`` and renamed to ``step-N`` after its manifest (sizes and CRC-32 of every
file) is on disk. An old one is renamed to ``.removing-step-N`` before it is deleted. So a folder named ``step-N`` is
complete by construction. Beside the learner it holds the driver's state: ``state.json``, and ``state.safetensors`` for
arrays.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from pipeline.disk import naming, require

log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"
_WRITING, _REMOVING = ".writing-", ".removing-"
_NAME = re.compile(r"step-(\d{8})$")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path

    @property
    def learner(self) -> Path:
        """Folder written by ``Learner.save``."""
        return self.path / "learner"

    def state(self) -> dict[str, Any]:
        """The driver's state, but for its arrays."""
        return json.loads((self.path / "state.json").read_text())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the driver's state, by name."""
        return load_file(self.path / "state.safetensors")


class CheckpointStore:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, root: Path, keep_last: int) -> None:
        self.root, self.keep_last = root, keep_last

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        save_learner: Callable[[Path], None],
    ) -> Checkpoint:
        """Write everything under one manifest, publish it by a rename, then ``prune``.

        ``state`` is JSON-serialisable; ``arrays`` are too large for JSON. ``save_learner`` gets an empty folder.
        A step that is already published is left as it is. If anything raises, earlier checkpoints are untouched, and
        what was written is removed. Raises ``DiskFullError`` before anything is written where there is no room for as
        much as the newest checkpoint takes.
        """
        final = self.root / f"step-{step:08d}"
        if not final.exists():
            self._publish(step, final, state, arrays, save_learner)
        self.prune()
        return Checkpoint(step, final)

    def prune(self) -> None:
        """Delete the oldest beyond ``keep_last``, and what a killed process left of writing or deleting.

        A folder that cannot be deleted (NFS keeps files that someone has open) is said in the process's log; the next
        ``prune`` tries again.
        """
        left = [path for prefix in (_WRITING, _REMOVING) for path in sorted(self.root.glob(f"{prefix}*"))]
        for path in [*left, *(old.path for old in self.complete()[: -self.keep_last])]:
            try:
                shutil.rmtree(_hidden(path))
            except OSError as error:
                log.warning("%s: cannot be deleted, which is tried again with the next checkpoint: %s", path, error)

    def _publish(
        self,
        step: int,
        final: Path,
        state: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        save_learner: Callable[[Path], None],
    ) -> None:
        self.prune()
        if newest := self.complete()[-1:]:
            size = sum(path.stat().st_size for path in newest[0].path.rglob("*") if path.is_file())
            require(self.root, size, f"a checkpoint after step {step}")
        writing = self.root / f"{_WRITING}step-{step:08d}"
        try:
            (writing / "learner").mkdir(parents=True)
            with naming(writing / "learner"):
                save_learner(writing / "learner")
            with naming(writing / "state.json"):
                (writing / "state.json").write_text(json.dumps(state))
            with naming(writing / "state.safetensors"):  # safetensors' own ``save_file`` makes files of mode 0600
                (writing / "state.safetensors").write_bytes(save(dict(arrays)))
            _write_manifest(writing, step)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        os.rename(writing, final)
        _sync_folder(self.root)

    def complete(self) -> list[Checkpoint]:
        """Every published checkpoint, oldest first."""
        found = [(_NAME.match(p.name), p) for p in self.root.glob("step-*")] if self.root.is_dir() else []
        return sorted((Checkpoint(int(m[1]), p) for m, p in found if m), key=lambda c: c.step)

    def latest(self) -> Checkpoint | None:
        """The newest published checkpoint, every file checked against the manifest; None when there is none.

        Raises ``CheckpointError`` naming the file that is missing or damaged.
        """
        complete = self.complete()
        if not complete:
            return None
        _check_files(complete[-1].path)
        return complete[-1]


def _hidden(path: Path) -> Path:
    """``path`` after a rename that takes it out of the sight of all readers; where it is hidden already, as it is."""
    if path.name.startswith(_REMOVING):
        return path
    names = (path.with_name(f"{_REMOVING}{path.name.lstrip('.')}{'+' * n}") for n in count())
    return path.rename(next(name for name in names if not name.exists()))


def _write_manifest(folder: Path, step: int) -> None:
    """Last of all, of every file in ``folder``."""
    files = {str(p.relative_to(folder)): _fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = json.dumps({"schema": SCHEMA, "step": step, "files": files}, indent=1)
    _write_durably(folder / f".{MANIFEST}", manifest)
    os.rename(folder / f".{MANIFEST}", folder / MANIFEST)


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32; the file is also flushed to disk, since the manifest will vouch for it."""
    crc = 0
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _check_files(path: Path) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error}); resume from an older checkpoint") from error
    if manifest["schema"] > SCHEMA:
        raise CheckpointError(
            f"{path} has checkpoint schema {manifest['schema']}; this version reads up to {SCHEMA}: update isentrope"
        )
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; delete {path} to resume from an older checkpoint")
        if _fingerprint(path / name) != expected:
            raise CheckpointError(
                f"{path / name} differs from the manifest; delete {path} to resume from an older checkpoint"
            )


def _write_durably(path: Path, text: str) -> None:
    with naming(path), path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
