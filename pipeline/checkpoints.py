"""Checkpoints: one folder, one manifest, complete or absent.

A checkpoint is written into ``.writing-step-N`` and renamed to ``step-N`` after its manifest (sizes and CRC-32 of every
file) is on disk. An old one is renamed to ``.removing-step-N`` before it is deleted. So a folder named ``step-N`` is
complete by construction. Beside the learner it holds the driver's state: ``state.json``, and ``state.safetensors`` for
arrays. What is read is not trusted: whatever the files hold, it is a checkpoint or a ``CheckpointError``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from safetensors.numpy import load_file, save

from pipeline.data import DataError
from pipeline.disk import naming, require

log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST, STATE, ARRAYS = "manifest.json", "state.json", "state.safetensors"
_WRITING, _REMOVING = ".writing-", ".removing-"
_NAME = re.compile(r"step-(\d{8})$")


class CheckpointError(DataError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


class _Fingerprint(msgspec.Struct, frozen=True):
    """Of a file's content."""

    bytes: int
    crc32: int


class _Manifest(msgspec.Struct):
    """Every file of a checkpoint but the manifest itself, by its path in the folder."""

    schema: Annotated[int, Meta(ge=1)]
    step: int
    files: dict[str, _Fingerprint]


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
        """The driver's state, but for its arrays. Raises ``CheckpointError`` unless it is a JSON object."""
        with self.examined(STATE):
            found = json.loads((self.path / STATE).read_bytes())
            if not isinstance(found, dict):
                raise ValueError("it is not a JSON object")
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the driver's state, by name."""
        return load_file(self.path / ARRAYS)

    @contextmanager
    def examined(self, name: str) -> Iterator[None]:
        """A ``ValueError`` that the block raises about a file's content becomes a ``CheckpointError``."""
        path = self.path / name
        try:
            yield
        except DataError:  # other data than the checkpoint was trained on: nothing is wrong with the file
            raise
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; {self.remedy}") from error
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; {self.remedy}") from error

    @property
    def remedy(self) -> str:
        """What to do without this checkpoint."""
        return f"delete {self.path} to resume from an older checkpoint"


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
            with naming(writing / STATE):
                (writing / STATE).write_text(json.dumps(state))
            with naming(writing / ARRAYS):  # safetensors' own ``save_file`` makes files of mode 0600
                (writing / ARRAYS).write_bytes(save(dict(arrays)))
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
        _check_files(complete[-1])
        return complete[-1]


def _hidden(path: Path) -> Path:
    """``path`` after a rename that takes it out of the sight of all readers; where it is hidden already, as it is."""
    if path.name.startswith(_REMOVING):
        return path
    names = (path.with_name(f"{_REMOVING}{path.name.lstrip('.')}{'+' * n}") for n in count())
    return path.rename(next(name for name in names if not name.exists()))


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _write_manifest(folder: Path, step: int) -> None:
    """Last of all, of every file in ``folder``."""
    files = {name: _fingerprint(path) for name, path in _files(folder).items()}
    manifest = msgspec.json.format(msgspec.json.encode(_Manifest(SCHEMA, step, files)), indent=1).decode()
    _write_durably(folder / f".{MANIFEST}", manifest)
    os.rename(folder / f".{MANIFEST}", folder / MANIFEST)


def _fingerprint(path: Path) -> _Fingerprint:
    """Size and CRC-32; the file is also flushed to disk, since the manifest will vouch for it."""
    crc = 0
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return _Fingerprint(path.stat().st_size, crc)


def _check_files(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    with checkpoint.examined(MANIFEST):
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=_Manifest)
        if manifest.step != checkpoint.step:
            raise ValueError(f"it is of step {manifest.step}")
        if unnamed := {STATE, ARRAYS} - manifest.files.keys():
            raise ValueError(f"it does not name {', '.join(sorted(unnamed))}")
    if manifest.schema > SCHEMA:
        raise CheckpointError(
            f"{path} has checkpoint schema {manifest.schema}; this version reads up to {SCHEMA}: update isentrope"
        )
    held = _files(path)
    for name, expected in manifest.files.items():
        if name not in held:
            raise CheckpointError(f"{path / name} is missing; {checkpoint.remedy}")
        if _fingerprint(held[name]) != expected:
            raise CheckpointError(f"{path / name} differs from the manifest; {checkpoint.remedy}")


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
