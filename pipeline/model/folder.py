"""Reads and writes the weights of a Hugging Face folder.

It reads slices through memory maps, and writes tensors in place into files laid out beforehand.

The only reader and writer of such a folder. A file is 8 bytes of header length (little-endian), a JSON header ``{name:
{dtype, shape, data_offsets}}`` and the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import re
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.model import fp8, mxfp4
from pipeline.model.architecture import Architecture
from pipeline.model.checksum import checksum, head
from pipeline.model.fp8_layout import scale_name, scale_shape
from pipeline.model.layout import EMBEDDING, HEAD, Row, ignored, predicts_ahead, renamed, sees
from pipeline.model.reading import ModelError, Refusal
from pipeline.model.stacked import Part, is_whole, parts
from pipeline.units import FP8_BLOCK

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 2**20  # bytes
_TIED_ROWS = 4096  # compared at a time
_SEEING = re.compile(r"^model\.language_model\.")  # before names of the model of text within one that also sees
_HEADER_LIMIT = 100_000_000  # bytes; as safetensors' own reader
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHTS = (
    "*.safetensors",
    f"*{INDEX.removeprefix('model')}",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
)

log = logging.getLogger(__name__)


def is_weights(path: Path) -> bool:
    """Whether a file of a model folder holds tensors, in whatever format, or lists the files that do."""
    return any(path.match(pattern) for pattern in _WEIGHTS)


def write_index(folder: Path, files: Mapping[str, str], nbytes: int) -> None:
    """Write the index of a folder of several files: ``files`` by tensor, ``nbytes`` of all tensors."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def nbytes_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def in_groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of ``sizes`` in order, grouped so that each group is at most ``limit`` or a single one."""
    groups: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += size
    return groups


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
        return nbytes_of(self.dtype, self.shape)


def mapped(path: Path, start: int, dtype: torch.dtype, count: int, *, write: bool = False) -> torch.Tensor:
    """``count`` entries of a file from byte ``start``: its own pages, read when touched and unmapped with the tensor.

    Writing to the tensor leaves the file alone, unless it is asked to ``write``.
    """
    if count == 0:
        return torch.empty(0, dtype=dtype)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    access = mmap.ACCESS_WRITE if write else mmap.ACCESS_COPY
    with path.open("r+b" if write else "rb") as file:
        pages = mmap.mmap(file.fileno(), start - page + count * dtype.itemsize, access=access, offset=page)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start - page)


def put(descriptor: int, start: int, name: str, tensor: torch.Tensor) -> int:
    """Write a contiguous tensor's bytes into a file at ``start``.

    Returns its ``pipeline.model.checksum``, under ``name``.

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
    """The tensors of a Hugging Face folder: one ``model.safetensors`` or the files of its index.

    Reads slices, not files. A matrix stored as FP8 codes with scales of blocks, as DeepSeek-V3's, is read as the
    bfloat16 values that the codes stand for (its own ``fp8_cast_bf16.py`` makes the same); its scales have no name. So
    are MXFP4 codes, as gpt-oss's. The model of text within one that also sees has the names that it has by itself, and
    so have experts that are stored in one tensor for all (``stacked``).

    Raises ``ModelError`` where a file is missing, truncated or not safetensors, or where the index is another model's.
    """

    def __init__(self, hf_path: Path, model: Architecture) -> None:
        """``model`` says which tensors may be parts of others."""
        self.path = hf_path
        self.entries: dict[str, Entry] = {}
        index = _index(hf_path)
        for file in sorted(set(index.values())) or [_SINGLE]:
            entries = _header(hf_path, file)
            if twice := sorted(entries.keys() & self.entries.keys()):
                problem = f"{twice[0]} is in {self.entries[twice[0]].file} and in {file}"
                raise _error(hf_path, problem, "remove one of them")
            self.entries |= entries
        if index and (apart := sorted(index.keys() ^ self.entries.keys())):
            problem = f"{INDEX} and the files that it names disagree on {', '.join(apart[:3])}"
            raise _error(hf_path, problem, "download the folder again, or remove what is left of another model")
        self.entries = {_SEEING.sub("model.", name): entry for name, entry in self.entries.items()}
        coded = {name for name, entry in self.entries.items() if entry.dtype == fp8.CODES}
        self._scales = {name: scale for name in coded if (scale := scale_name(name)) in self.entries}
        for name, scale in self._scales.items():
            wanted, entry = scale_shape(self.entries[name].shape), self.entries[scale]
            if (entry.dtype, entry.shape) != (torch.float32, wanted):
                problem = f"{scale} is {entry.dtype} {list(entry.shape)}, not float32 {list(wanted)}"
                raise _error(hf_path, problem, "give a folder of FP8 codes in blocks of 128x128, or one in 16 bits")
        self._parts = self._find_parts(parts(model)) if any(map(is_whole, self.entries)) else {}

    def _find_parts(self, wanted: Mapping[str, Part]) -> dict[str, Part]:
        """Those of ``wanted`` whose whole is there, in one of its two forms, and of the right shape."""
        found = {}
        for name, part in wanted.items():
            codes, scales = part.whole + mxfp4.BLOCKS, part.whole + mxfp4.SCALES
            if part.whole in self.entries:
                shapes = {part.whole: part.whole_shape}
            elif part.turned and {codes, scales} <= self.entries.keys():
                experts, width, out = part.whole_shape
                groups = experts, out, width // mxfp4.GROUP
                shapes = {codes: (*groups, mxfp4.GROUP // 2), scales: groups}
            else:
                continue
            for stored, shape in shapes.items():
                if (has := self.entries[stored].shape) != shape:
                    problem = f"{stored} has shape {list(has)}, config.json asks for {list(shape)}"
                    raise _error(self.path, problem, "restore the folder, or its config.json")
            found[name] = part
        return found

    def names(self) -> set[str]:
        """Names of all tensors."""
        wholes = {part.whole for part in self._parts.values()}
        apart = {whole + end for whole in wholes for end in ("", mxfp4.BLOCKS, mxfp4.SCALES)}
        return (self.entries.keys() - set(self._scales.values()) - apart) | self._parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return (self._parts.get(name) or self.entries[name]).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's values."""
        stored = part.whole if (part := self._parts.get(name)) else name
        coded = name in self._scales or (part is not None and stored not in self.entries)
        return torch.bfloat16 if coded else self.entries[stored].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor: a view of the file, or values of its codes."""
        return self.read(name, 0, 0, self.shape(name)[0])

    def stored(self, name: str) -> torch.Tensor:
        """A whole tensor as the file has it, codes and scales included: a view of the file."""
        if part := self._parts.get(name):
            return self._part(part).contiguous()
        return self._view(name, 0, 0, self.shape(name)[0])

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries ``[start, start + length)`` of a tensor along ``dim``.

        A view of the file, contiguous for ``dim`` 0; of codes a new tensor, made of the blocks that are touched.
        """
        if part := self._parts.get(name):
            return self._part(part).narrow(dim, start, length)
        if name not in self._scales:
            return self._view(name, dim, start, length)
        first, last = start // FP8_BLOCK, -(-(start + length) // FP8_BLOCK)
        begin, end = first * FP8_BLOCK, min(last * FP8_BLOCK, self.shape(name)[dim])
        codes = self._view(name, dim, begin, end - begin)
        scales = self._view(self._scales[name], dim, first, last - first)
        return fp8.dequantise(codes, scales, dtype=torch.bfloat16).narrow(dim, start - begin, length)

    def require_finite(self, name: str, values: torch.Tensor) -> None:
        """Refuse NaN and infinite ``values``, read of a tensor. Raises ``ModelError`` with the tensor and its file."""
        if not finite(values):
            stored = part.whole if (part := self._parts.get(name)) else name
            file = self.entries[stored if stored in self.entries else stored + mxfp4.BLOCKS].file
            problem = f"the tensor {name} in {file} holds NaN or infinite values"
            raise _error(self.path, problem, f"download {file} again, or give an earlier checkpoint of the model")

    def _part(self, part: Part) -> torch.Tensor:
        """An expert's tensor: a view of the file, or values of its codes."""
        if part.whole in self.entries:
            return part.within(self._view(part.whole, 0, part.expert, 1)[0])
        blocks, scales = (
            self._view(part.whole + end, 0, part.expert, 1)[0][part.rows] for end in (mxfp4.BLOCKS, mxfp4.SCALES)
        )
        return mxfp4.dequantise(blocks, scales)

    def _view(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        entry = self.entries[name]
        path, row = self.path / entry.file, math.prod(entry.shape[1:])
        if dim == 0:
            first = entry.start + start * row * entry.dtype.itemsize
            return mapped(path, first, entry.dtype, length * row).view(length, *entry.shape[1:])
        whole = mapped(path, entry.start, entry.dtype, math.prod(entry.shape)).view(entry.shape)
        return whole.narrow(dim, start, length)


def finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; it reads 16 GB/s on one core, ``isfinite`` less than 1."""
    return values.numel() == 0 or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _error(where: Path, problem: str, remedy: str) -> ModelError:
    return ModelError([Refusal(problem, remedy)], str(where))


def _index(folder: Path) -> dict[str, str]:
    """File of every tensor, or nothing where ``model.safetensors`` has no index; beside one, the index must be its own.

    transformers reads ``model.safetensors`` where both are there, others the files of the index: two different models.
    """
    index, single = folder / INDEX, (folder / _SINGLE).is_file()
    if not index.is_file():
        if not single:
            remedy = "download it again, or convert the checkpoint to safetensors first"
            raise _error(folder, f"has neither {_SINGLE} nor {INDEX}", remedy)
        return {}
    try:
        files = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _error(index, f"no index of safetensors files ({error!r})", "download it again") from error
    if single and (others := sorted(set(files.values()) - {_SINGLE})):
        problem = f"{_SINGLE} lies beside {INDEX}, which names {', '.join(others[:3])}"
        raise _error(folder, problem, "remove what is left of another model")
    return files


def _header(folder: Path, file: str) -> dict[str, Entry]:
    """The tensors of one file, which must be as long as its header says."""
    path, again = folder / file, "download it again"
    if not path.is_file():
        raise _error(folder, f"lacks {file}, which {INDEX} names", again)
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise _error(
                folder, f"{file} is truncated, or no safetensors file: {size} bytes, header of {length}", again
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise _error(folder, f"{file} has a damaged header ({error})", again) from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        problem = f"{file} is truncated or damaged: its header describes {expected} bytes, it has {size}"
        raise _error(folder, problem, again)
    entries = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            problem = f"{file}: {name} has type {entry['dtype']}, which is not one of {', '.join(DTYPES)}"
            raise _error(folder, problem, "give the folder of the same model in 16 or 32 bits")
        start = 8 + length + entry["data_offsets"][0]
        entries[name] = Entry(file, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return entries


def check(folder: Folder, rows: Sequence[Row], model: Architecture) -> None:
    """Refuse a folder whose tensors are not exactly those of ``rows``, the whole model's.

    Raises ``ModelError`` that names the tensor, both shapes and the layout row.
    """
    present, restore = folder.names(), "restore the folder, or its config.json"
    for row in rows:
        for source in row.sources:
            if source.name not in present:
                raise _error(folder.path, f"lacks the tensor {source.name}; needed by {row}", restore)
            if (dtype := folder.dtype(source.name)).itemsize == 1:
                remedy = "give the folder of the same model in 16 or 32 bits"
                lacks = f"{source.name} is {dtype}, without {scale_name(source.name)} beside it"
                raise _error(folder.path, lacks, remedy)
            if (shape := folder.shape(source.name)) != source.shape:
                problem = f"{source.name} has shape {list(shape)}, config.json asks for {list(source.shape)}"
                raise _error(folder.path, f"{problem}; needed by {row}", restore)
    known = {source.name for row in rows for source in row.sources}
    if extra := sorted(name for name in present - known if not ignored(name, model)):
        problem = f"holds {len(extra)} tensors that {model.family.name} does not have: {', '.join(extra[:5])}"
        more = ", ..." if len(extra) > 5 else ""
        raise _error(folder.path, problem + more, "is architectures in config.json right?")
    if model.tied:
        _check_tied(folder, model)
    if ahead := sum(predicts_ahead(name, model) for name in present):
        log.warning("%s: %d tensors of its multi-token-prediction layers are left out", folder.path, ahead)
    if seeing := sum(sees(name, model) for name in present):
        log.warning("%s: %d tensors that turn pictures into embeddings are left out", folder.path, seeing)


def _check_tied(folder: Folder, model: Architecture) -> None:
    """Refuse a stored output layer that is not the embedding, although config.json ties them."""
    head, embedding = renamed(HEAD, model), renamed(EMBEDDING, model)
    if head not in folder.names():
        return
    if folder.shape(head) == folder.shape(embedding):
        bands = range(0, model.vocab, _TIED_ROWS)
        pairs = (
            [folder.read(name, 0, i, min(_TIED_ROWS, model.vocab - i)) for name in (head, embedding)] for i in bands
        )
        if all(torch.equal(left, right.to(left.dtype)) for left, right in pairs):
            return
    raise _error(
        folder.path,
        f"tie_word_embeddings is true in config.json, but {head} differs from {embedding}",
        f"set tie_word_embeddings to false, or remove {head}",
    )


class Files:
    """The safetensors files of a folder to be written: every tensor's place is known before its values are."""

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        limit: int,
        stacked: Mapping[str, Part] = {},
    ) -> None:
        """``tensors`` in the order of the files, each of at most ``limit`` bytes or one larger tensor; those of
        ``stacked`` are written as parts of others.
        """
        self.folder, self._stacked = folder, stacked
        tensors = {
            part.whole if (part := stacked.get(name)) else name: (dtype, part.whole_shape if part else shape)
            for name, (dtype, shape) in tensors.items()
        }
        names, groups = list(tensors), in_groups([nbytes_of(dtype, shape) for dtype, shape in tensors.values()], limit)
        self.entries: dict[str, Entry] = {}
        self._headers: dict[str, bytes] = {}
        for number, group in enumerate(groups, 1):
            single = len(groups) == 1
            file = _SINGLE if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            # As safetensors' own writer: the widest types first, so that every tensor is aligned.
            order = sorted((names[index] for index in group), key=lambda name: -tensors[name][0].itemsize)
            self._headers[file] = self._place(file, {name: tensors[name] for name in order})
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def _place(self, file: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
        """Set the entries of one file and return its header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start, starts = 0, {}
        for name, (dtype, shape) in tensors.items():
            starts[name] = start
            start += nbytes_of(dtype, shape)
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
            write_index(self.folder, {name: entry.file for name, entry in self.entries.items()}, self.nbytes)

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Put a contiguous tensor in its place; returns its checksum. Safe to call from several threads."""
        if part := self._stacked.get(name):
            return self._write_part(name, part, tensor)
        entry = self.entries[name]
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, its place is {entry}")
        return put(self._descriptor(entry.file), entry.start, name, tensor)

    def _write_part(self, name: str, part: Part, tensor: torch.Tensor) -> int:
        entry = self.entries[part.whole]
        whole = mapped(self.folder / entry.file, entry.start, entry.dtype, math.prod(entry.shape), write=True)
        place = part.of(whole.view(entry.shape))
        if (tensor.dtype, tensor.shape) != (place.dtype, place.shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, its place is a part of {entry}")
        place.copy_(tensor)
        self._descriptor(entry.file)  # so that it is flushed
        return checksum({name: tensor})

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
