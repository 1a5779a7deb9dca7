"""Folders of safetensors files: slices read through memory maps, tensors written in place into files laid out beforehand.

A file is 8 bytes of header length (little-endian), a JSON header ``{name: {dtype, shape, data_offsets}}`` and the tensors' bytes
(https://github.com/huggingface/safetensors#format). No megatron here.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.model.architecture import Architecture
from pipeline.model.checksum import head
from pipeline.model.layout import Row, ignored

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 2**20  # bytes
_HEADER_LIMIT = 100_000_000  # bytes; as safetensors' own reader
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: str  # within the folder
    start: int  # of its first byte in the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * self.dtype.itemsize


def mapped(path: Path, start: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """``count`` entries of a file from byte ``start``: its own pages, read when touched and unmapped with the tensor.

    Writing to the tensor leaves the file alone.
    """
    if count == 0:
        return torch.empty(0, dtype=dtype)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), start - page + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start - page)


def put(descriptor: int, start: int, name: str, tensor: torch.Tensor) -> int:
    """Write a contiguous tensor's bytes into a file at ``start``; returns ``pipeline.model.checksum`` of it, under ``name``.

    Block by block: what the checksum has just read is still in the processor's cache when it is written.
    """
    crc = zlib.crc32(head(name, tensor))
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), _BLOCK):
        block = data[begin : begin + _BLOCK]
        crc = zlib.crc32(block, crc)
        done = 0
        while done < len(block):
            done += os.pwrite(descriptor, block[done:], start + begin + done)
    return crc


class Folder:
    """The tensors of a Hugging Face folder: one ``model.safetensors`` or the files of its index. Reads slices, not files.

    Raises ``FileNotFoundError`` or ``ValueError`` where a file is missing, truncated or not safetensors.
    """

    def __init__(self, hf_path: Path) -> None:
        self.path = hf_path
        index = hf_path / INDEX
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (hf_path / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise FileNotFoundError(f"{hf_path} has neither model.safetensors nor {INDEX}")
        self.entries: dict[str, Entry] = {}
        for file in files:
            self.entries.update(_header(hf_path, file))

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self.entries[name].dtype

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries ``[start, start + length)`` of a tensor along ``dim``: a view of the file, contiguous for ``dim`` 0."""
        entry = self.entries[name]
        path, row = self.path / entry.file, math.prod(entry.shape[1:])
        if dim == 0:
            first = entry.start + start * row * entry.dtype.itemsize
            return mapped(path, first, entry.dtype, length * row).view(length, *entry.shape[1:])
        whole = mapped(path, entry.start, entry.dtype, math.prod(entry.shape)).view(entry.shape)
        return whole.narrow(dim, start, length)


def _header(folder: Path, file: str) -> dict[str, Entry]:
    """The tensors of one file, which must be as long as its header says."""
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {file}, which {INDEX} names: download it again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{path} is truncated, or no safetensors file: {size} bytes, header of {length}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{path} has a damaged header ({error}): download it again") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{path} is truncated or damaged: its header describes {expected} bytes, it has {size}")
    entries = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} has type {entry['dtype']}, which is not one of {', '.join(DTYPES)}")
        start = 8 + length + entry["data_offsets"][0]
        entries[name] = Entry(file, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return entries


def check(folder: Folder, rows: Sequence[Row], model: Architecture) -> None:
    """Refuse a folder whose tensors are not exactly those of ``rows``, the whole model's.

    Raises ``ValueError`` that names the tensor, both shapes and the layout row.
    """
    present = folder.names()
    for row in rows:
        for source in row.sources:
            if source.name not in present:
                raise ValueError(f"{folder.path} lacks the tensor {source.name}; needed by {row}")
            if folder.dtype(source.name).itemsize == 1:
                raise ValueError(
                    f"{folder.path}: {source.name} is {folder.dtype(source.name)}: give the folder of the same model in 16 or 32 bits"
                )
            if folder.shape(source.name) != source.shape:
                raise ValueError(
                    f"{folder.path}: {source.name} has shape {list(folder.shape(source.name))}, "
                    f"config.json asks for {list(source.shape)}; needed by {row}"
                )
    known = {source.name for row in rows for source in row.sources}
    if extra := sorted(name for name in present - known if not ignored(name, model)):
        raise ValueError(
            f"{folder.path} holds {len(extra)} tensors that {model.family.name} does not have: {', '.join(extra[:5])}"
            f"{', ...' if len(extra) > 5 else ''}; is architectures in config.json right?"
        )


class Files:
    """The safetensors files of a folder to be written: every tensor's place is known before its values are."""

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> None:
        """``tensors`` in the order of the files, each of at most ``limit`` bytes or one larger tensor."""
        self.folder = folder
        groups: list[list[str]] = []
        size = 0
        for name, (dtype, shape) in tensors.items():
            nbytes = math.prod(shape) * dtype.itemsize
            if not groups or size + nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += nbytes
        self.entries: dict[str, Entry] = {}
        self._headers: dict[str, bytes] = {}
        for number, names in enumerate(groups, 1):
            single = len(groups) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            # As safetensors' own writer: the widest types first, so that every tensor is aligned.
            order = sorted(names, key=lambda name: -tensors[name][0].itemsize)
            self._headers[file] = self._place(file, {name: tensors[name] for name in order})
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def _place(self, file: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
        """Set the entries of one file and return its header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start, starts = 0, {}
        for name, (dtype, shape) in tensors.items():
            starts[name] = start
            start += math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], start]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name, (dtype, shape) in tensors.items():
            self.entries[name] = Entry(file, 8 + len(text) + starts[name], dtype, tuple(shape))
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def allocate(self) -> None:
        """Create the files at their full size, so that a disk too small is found before any work. Idempotent."""
        for file, header in self._headers.items():
            end = max(entry.start + entry.nbytes for entry in self.entries.values() if entry.file == file)
            with (self.folder / file).open("r+b" if (self.folder / file).exists() else "w+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, end)
                stream.write(header)
        if len(self._headers) > 1:
            weight_map = {name: entry.file for name, entry in self.entries.items()}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2))

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Put a contiguous tensor in its place; returns its checksum. Safe to call from several threads."""
        entry = self.entries[name]
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, its place is {entry}")
        return put(self._descriptor(entry.file), entry.start, name, tensor)

    def flush(self) -> None:
        """Force what was written onto the disk."""
        for descriptor in list(self._descriptors.values()):
            os.fsync(descriptor)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self.folder / file, os.O_WRONLY)
            return self._descriptors[file]
