"""Work cut into parts: done by threads within a memory budget, and taken up again, part by part, after a kill.

Everything is written into a folder of another name, beside the one asked for, and renamed when it is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from typing import Any

import torch

JOURNAL = "journal.jsonl"


class ConversionError(RuntimeError):
    """A conversion that failed although what it was asked for is possible: disk full, damaged files."""


class Budget:
    """Bytes that all workers together may hold; one that needs more than all of it waits to be alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Within, ``nbytes`` are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + nbytes <= self._limit)
            self._held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()


class Work:
    """The folder in which ``out`` is made, and its journal: what is being made, then one line per finished part.

    A context: the folder is locked within. Raises ``ValueError`` where ``out`` exists and is not empty, where another
    process is at work, or where an unfinished conversion with other ``settings`` is in the way.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists already: choose another --out, or remove it")
        self.out, self.folder = out, out.with_name(f".{out.name}.converting")
        self._settings = json.loads(json.dumps(settings))
        self.finished: dict[int, Any] = {}

    def __enter__(self) -> Work:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = (self.folder / JOURNAL).open("a+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._journal.close()
            raise ValueError(f"{self.out} is being written by another process") from error
        self._journal.seek(0)
        lines = self._journal.read().split("\n")
        complete, torn = lines[:-1], lines[-1]
        if not complete:
            self._journal.truncate(0)
            self._append(self._settings)
            return self
        if json.loads(complete[0]) != self._settings:
            self._journal.close()
            raise ValueError(
                f"{self.folder} holds an unfinished conversion of another source or with other options: "
                "remove it, or choose another --out"
            )
        self.finished = {entry["part"]: entry["result"] for entry in map(json.loads, complete[1:])}
        if torn:  # killed while writing this line
            self._journal.truncate(sum(len(line.encode()) + 1 for line in complete))
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def run(
        self, parts: Sequence[int], convert: Callable[[int], Any], workers: int, progress: Callable[[int], None]
    ) -> list[Any]:
        """``convert(i)`` of every part that is not finished, on ``workers`` threads; results of all, in order.

        ``parts`` are their sizes in bytes, reported to ``progress`` as they finish. A result is JSON; what it stands
        for must be on disk when ``convert`` returns. Raises ``ConversionError`` where the disk is full.
        """
        progress(sum(parts[index] for index in self.finished))
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            futures = {pool.submit(convert, i): i for i in range(len(parts)) if i not in self.finished}
            for future in as_completed(futures):
                part = futures[future]
                self.finished[part] = result = future.result()
                self._append({"part": part, "result": result})
                progress(parts[part])
        except OSError as error:
            raise ConversionError(
                f"{self.out} could not be written: {error.strerror or error}. {len(self.finished)} of {len(parts)} "
                f"parts are kept in {self.folder}: make room and give the same command again, or remove that folder"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        return [self.finished[index] for index in range(len(parts))]

    def publish(self) -> None:
        """Give the finished folder its name."""
        (self.folder / JOURNAL).unlink()
        _sync(self.folder)
        os.rename(self.folder, self.out)
        _sync(self.out.parent)

    def _append(self, entry: Any) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
