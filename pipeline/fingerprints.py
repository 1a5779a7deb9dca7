"""Size and checksum of files: taken while a file is written, compared before it is trusted."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.disk import naming

_BLOCK = 1 << 22  # bytes read at once


class Fingerprint(msgspec.Struct, frozen=True):
    """Of a file's content."""

    bytes: int
    crc32: int


Files = Mapping[str, Fingerprint]  # by path in a folder


class DamagedFileError(ValueError):
    """A file is missing, or its content is not what its fingerprint says; the message names the file."""


class SummedFile(io.FileIO):
    """A file that is written from its beginning to its end, and knows its fingerprint."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self._bytes = self._crc = 0

    def write(self, data: Any) -> int:
        """All of ``data``, where the system call may take less (2 GiB at most)."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += super().write(view[written:])
        self._crc = zlib.crc32(view, self._crc)  # as the write above, without the interpreter's lock
        self._bytes += written
        return written

    def fingerprint(self) -> Fingerprint:
        """Of what has been written."""
        return Fingerprint(self._bytes, self._crc)


def write(path: Path, data: bytes) -> Fingerprint:
    """Make a file that is on the disk when this returns. A failure of the disk names ``path``."""
    with naming(path), SummedFile(path) as file:
        file.write(data)
        os.fsync(file.fileno())
        return file.fingerprint()


def read_back(path: Path) -> Fingerprint:
    """The fingerprint of a file that another made, which is also flushed to the disk. A failure names ``path``."""
    crc = 0
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return Fingerprint(path.stat().st_size, crc)


def check_sizes(folder: Path, files: Files) -> None:
    """Raise ``DamagedFileError`` where a file is missing or has another size. Reads no content."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFileError(f"{path} is missing")
        if (size := path.stat().st_size) != expected.bytes:
            raise DamagedFileError(f"{path} differs from the manifest: {size:,} bytes, not {expected.bytes:,}")


def check_contents(folder: Path, files: Files, names: Iterable[str]) -> None:
    """Raise ``DamagedFileError`` where the content of one of ``names`` is not what ``files`` says."""
    check_sizes(folder, {name: files[name] for name in names})
    for name in names:
        if read_back(folder / name) != files[name]:
            raise DamagedFileError(f"{folder / name} differs from the manifest: its checksum is another")
