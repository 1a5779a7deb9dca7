"""Checkpoints: one folder, one manifest, complete or absent.

A checkpoint is written into ``.writing-step-N``, in the background of the training that goes on, and renamed to
``step-N`` after its manifest (sizes and CRC-32 of every file, taken by whoever wrote it) is on disk. An old one is
renamed to ``.removing-step-N`` before it is deleted. So a folder named ``step-N`` is complete by construction. Beside
the learner it holds the driver's state: ``state.json``, and ``state.safetensors`` for arrays. What is read is not
trusted: whatever the files hold, it is a checkpoint or a ``CheckpointError``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from safetensors.numpy import load_file, save

from pipeline import fingerprints
from pipeline.data import DataError
from pipeline.disk import naming, require
from pipeline.fingerprints import DamagedFileError, Files, Fingerprint

log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST, STATE, ARRAYS = "manifest.json", "state.json", "state.safetensors"
_LEARNER = "learner"  # folder
_WRITING, _REMOVING = ".writing-", ".removing-"
_NAME = re.compile(r"step-(\d{8})$")


class CheckpointError(DataError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


class _Manifest(msgspec.Struct):
    """Every file of a checkpoint but the manifest itself, by its path in the folder."""

    schema: Annotated[int, Meta(ge=1)]
    step: int
    files: dict[str, Fingerprint]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path

    def restore(self, restore_learner: Callable[[Path, Files], None]) -> None:
        """Have a learner load its part, by its ``restore``; the ranks that read the files check them first.

        Raises ``CheckpointError`` naming a file that is missing or damaged.
        """
        prefix = f"{_LEARNER}/"
        files = {name.removeprefix(prefix): found for name, found in self.files().items() if name.startswith(prefix)}
        with self.vouching():
            restore_learner(self.path / _LEARNER, files)

    def files(self) -> Files:
        """What the manifest says of every other file. Raises ``CheckpointError`` where the manifest is damaged."""
        with self.examined(MANIFEST):
            manifest = msgspec.json.decode((self.path / MANIFEST).read_bytes(), type=_Manifest)
            if manifest.step != self.step:
                raise ValueError(f"it is of step {manifest.step}")
            if unnamed := {STATE, ARRAYS} - manifest.files.keys():
                raise ValueError(f"it does not name {', '.join(sorted(unnamed))}")
        if manifest.schema > SCHEMA:
            raise CheckpointError(
                f"{self.path} has checkpoint schema {manifest.schema}; this version reads up to {SCHEMA}: update "
                "isentrope"
            )
        return manifest.files

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

    @contextmanager
    def vouching(self) -> Iterator[None]:
        """A ``DamagedFileError`` that leaves the block becomes a ``CheckpointError`` with the remedy."""
        try:
            yield
        except DamagedFileError as error:
            raise CheckpointError(f"{error}; {self.remedy}") from error

    @property
    def remedy(self) -> str:
        """What to do without this checkpoint."""
        return f"delete {self.path} to resume from an older checkpoint"


class CheckpointStore:
    """The ``checkpoints/`` folder of a run. It writes one checkpoint at a time, while training goes on."""

    def __init__(self, root: Path, keep_last: int) -> None:
        self.root, self.keep_last = root, keep_last
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Checkpoint] | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        save_learner: Callable[[Path], Callable[[], Files]],
    ) -> None:
        """Begin a checkpoint of what is given as it is now; ``finished`` tells when it is published, or what failed.

        ``state`` is JSON-serialisable; ``arrays`` are too large for JSON. ``save_learner`` gets an empty folder and
        returns what fills it, in the background: see ``pipeline.learner.Learner.save``. A step that is already
        published is left as it is. Whatever fails, earlier checkpoints are untouched, and what was written is removed.
        Raises ``DiskFullError`` before anything is written where there is no room for as much as the newest checkpoint
        takes, and ``RuntimeError`` where the checkpoint before has not been asked for by ``finished``.
        """
        if self._writing is not None:
            raise RuntimeError("CheckpointStore.finished must tell of one checkpoint before the next begins")
        final = self.root / f"step-{step:08d}"
        write = _nothing if final.exists() else self._begun(step, state, arrays, save_learner)
        self._writing = self._writer.submit(self._publish, step, final, write)

    def finished(self, *, wait: bool) -> Checkpoint | None:
        """The checkpoint that was begun, once, when it is published; raises what failed. None: not yet, or none was.

        ``wait``: until it is.
        """
        writing = self._writing
        if writing is None or not (wait or writing.done()):
            return None
        self._writing = None
        return writing.result()

    def wait(self) -> None:
        """Let a checkpoint that was begun end one way or the other. For a run that fails: raises nothing."""
        if self._writing is not None and (error := self._writing.exception()) is not None:
            log.warning("the checkpoint in the making failed too: %s", error)

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

    def _begun(
        self,
        step: int,
        state: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        save_learner: Callable[[Path], Callable[[], Files]],
    ) -> Callable[[], None]:
        """Make the folder and take the state as it is; what is returned writes all of it, the manifest last."""
        self.prune()
        if newest := self.complete()[-1:]:
            size = sum(path.stat().st_size for path in newest[0].path.rglob("*") if path.is_file())
            require(self.root, size, f"a checkpoint after step {step}")
        writing = self.root / f"{_WRITING}step-{step:08d}"
        own = {STATE: json.dumps(state).encode(), ARRAYS: save(dict(arrays))}
        with _removed_on_failure(writing), naming(writing / _LEARNER):
            (writing / _LEARNER).mkdir(parents=True)
            write_learner = save_learner(writing / _LEARNER)

        def write() -> None:
            with _removed_on_failure(writing):
                with naming(writing / _LEARNER):
                    files = {f"{_LEARNER}/{name}": found for name, found in write_learner().items()}
                files |= {name: fingerprints.write(writing / name, data) for name, data in own.items()}
                _write_manifest(writing, step, files)
                os.rename(writing, self.root / f"step-{step:08d}")
            _sync_folder(self.root)

        return write

    def _publish(self, step: int, final: Path, write: Callable[[], None]) -> Checkpoint:
        write()
        self.prune()
        return Checkpoint(step, final)

    def complete(self) -> list[Checkpoint]:
        """Every published checkpoint, oldest first."""
        found = [(_NAME.match(p.name), p) for p in self.root.glob("step-*")] if self.root.is_dir() else []
        return sorted((Checkpoint(int(m[1]), p) for m, p in found if m), key=lambda c: c.step)

    def latest(self) -> Checkpoint | None:
        """The newest published checkpoint; None when there is none.

        Every file is there in its full size, and the driver's own are what the manifest says. What the learner's hold
        is checked by its ranks, each some of them, when they load: ``Checkpoint.restore``. Raises ``CheckpointError``
        naming the file that is missing or damaged.
        """
        complete = self.complete()
        if not complete:
            return None
        newest = complete[-1]
        files = newest.files()
        with newest.vouching():
            fingerprints.check_sizes(newest.path, files)
            fingerprints.check_contents(newest.path, files, (STATE, ARRAYS))
        return newest


def _hidden(path: Path) -> Path:
    """``path`` after a rename that takes it out of the sight of all readers; where it is hidden already, as it is."""
    if path.name.startswith(_REMOVING):
        return path
    names = (path.with_name(f"{_REMOVING}{path.name.lstrip('.')}{'+' * n}") for n in count())
    return path.rename(next(name for name in names if not name.exists()))


def _nothing() -> None:
    """What is left to write of a checkpoint that is published."""


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_manifest(folder: Path, step: int, files: Files) -> None:
    """Last of all, of every other file in ``folder``."""
    manifest = msgspec.json.format(msgspec.json.encode(_Manifest(SCHEMA, step, dict(sorted(files.items())))), indent=1)
    fingerprints.write(folder / f".{MANIFEST}", manifest)
    os.rename(folder / f".{MANIFEST}", folder / MANIFEST)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
