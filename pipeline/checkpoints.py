"""Checkpoints: one folder, one manifest, complete or absent.

A checkpoint is written into ``.writing-step-N`` and renamed to ``step-N`` after its manifest (sizes and CRC-32 of every file) is on
disk, so a folder of that name is complete by construction. What it holds beside the learner is the driver's state: one
JSON document.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk import require

SCHEMA = 1
MANIFEST = "manifest.json"
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
        """The driver's state."""
        return json.loads((self.path / "state.json").read_text())


class CheckpointStore:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, root: Path, keep_last: int) -> None:
        self.root, self.keep_last = root, keep_last

    def save(self, step: int, state: Mapping[str, Any], save_learner: Callable[[Path], None]) -> Checkpoint:
        """Write everything under one manifest, publish it by a rename, then drop the oldest beyond ``keep_last``.

        ``save_learner`` gets an empty folder. A step that is already published is left as it is. If anything raises, earlier
        checkpoints are untouched, and what was written is removed. Raises ``DiskFullError`` before anything is written where there is no
        room for as much as the newest checkpoint takes.
        """
        writing, final = self.root / f".writing-step-{step:08d}", self.root / f"step-{step:08d}"
        if final.exists():
            return Checkpoint(step, final)
        for left in self.root.glob(".writing-*"):  # by a process that was killed
            shutil.rmtree(left)
        if newest := self.complete()[-1:]:
            size = sum(path.stat().st_size for path in newest[0].path.rglob("*") if path.is_file())
            require(self.root, size, f"a checkpoint after step {step}")
        try:
            self._write(writing, step, state, save_learner)
        finally:
            if not (writing / MANIFEST).exists():
                shutil.rmtree(writing, ignore_errors=True)
        os.rename(writing, final)
        _sync_folder(self.root)
        for old in self.complete()[: -self.keep_last]:
            shutil.rmtree(old.path)
        return Checkpoint(step, final)

    def _write(self, folder: Path, step: int, state: Mapping[str, Any], save_learner: Callable[[Path], None]) -> None:
        """Everything, the manifest last."""
        (folder / "learner").mkdir(parents=True)
        save_learner(folder / "learner")
        (folder / "state.json").write_text(json.dumps(state))
        files = {str(p.relative_to(folder)): _fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        manifest = json.dumps({"schema": SCHEMA, "step": step, "files": files}, indent=1)
        _write_durably(folder / f".{MANIFEST}", manifest)
        os.rename(folder / f".{MANIFEST}", folder / MANIFEST)

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


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32; the file is also flushed to disk, since the manifest will vouch for it."""
    crc = 0
    with path.open("rb") as file:
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
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
