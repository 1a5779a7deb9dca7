"""Layout rows in megatron-core's distributed checkpoint format (``torch_dist``), written and read tensor by tensor.

The format is PyTorch's distributed checkpoint: ``.distcp`` files of ``torch.save`` records and one ``.metadata`` that
says which box of which global tensor each record holds; beside it megatron's ``metadata.json`` and ``common.pt``. The
global tensor of a row is the parameter at TP 1, without vocabulary padding; layers, where all are alike, and experts
are stacked along leading axes (megatron-core: ``TransformerBlock``, ``SequentialMLP`` and ``MLP.sharded_state_dict``).
No megatron here: conversion starts fast.
"""

from __future__ import annotations

import functools
import io
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import skip_data
from torch.utils.serialization import config as serialization

from megatron_ext.weights.merge import merge
from megatron_ext.weights.unpickle import read_metadata
from pipeline.model import lora
from pipeline.model.architecture import Architecture
from pipeline.model.folder import mapped, put
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, Slice, canonical

CONFIG = "metadata.json"  # megatron-core: dist_checkpointing/core.py; written last, so what has it is complete
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_EXTRA_FILE = "__extra.distcp"

# Norms that Transformer Engine fuses into the linear layer after them. Megatron's local layers store some under these
# names too; a norm is written under both, one record, so that either kind of model finds it.
_FUSED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
_FUSED_MLA = {
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
    ".self_attention.q_layernorm.weight": ".self_attention.linear_q_up_proj.layer_norm_weight",
    ".self_attention.kv_layernorm.weight": ".self_attention.linear_kv_up_proj.layer_norm_weight",
}


@dataclass(frozen=True)
class Stored:
    """A row's tensor in a checkpoint."""

    keys: tuple[str, ...]  # all names of the one record, the layout's own first
    index: tuple[int, ...]  # position along the leading axes: layer, expert
    axes: tuple[int, ...]  # their sizes
    shape: tuple[int, ...]  # of the row's own tensor, behind the leading axes


def stored(row: Row, model: Architecture, stacked: bool | None = None) -> Stored:
    """Where megatron-core's ``sharded_state_dict`` puts a row of ``model``.

    Dense layers are ``stacked``; those of a model with a list of expert layers or of delta nets (``moe_layer_freq``,
    ``linear_attention_freq``, as ``models`` sets them) are not.
    """
    name, leading = row.parameter, []
    alike = model.moe is None and model.delta is None
    if row.layer is not None and (alike if stacked is None else stacked):
        name = name.replace(f"decoder.layers.{row.layer}.", "decoder.layers.", 1)
        leading.append((row.layer, model.layers))
    if row.expert is not None and model.moe is not None:
        name = name.replace(f".local_experts.{row.expert}.", ".experts.", 1)
        leading.append((row.expert, model.moe.experts))
    fused = _FUSED_MLA if model.mla else _FUSED
    others = tuple(name.removesuffix(end) + other for end, other in fused.items() if name.endswith(end))
    return Stored((name, *others), tuple(i for i, _ in leading), tuple(size for _, size in leading), row.local_shape(1))


@dataclass(frozen=True)
class Chunk:
    """Entries ``[start, start + length)`` of a row's tensor along ``row.dim``: one record of a checkpoint."""

    row: Row
    start: int
    length: int
    slices: tuple[Slice, ...]  # what it is made of; their ``start`` counts from the chunk's

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, without leading axes."""
        shape = list(self.row.local_shape(1))
        shape[self.row.dim] = self.length
        return tuple(shape)


def chunks(row: Row, tp: int, rank: int) -> tuple[Chunk, ...]:
    """The records that rank ``rank`` of ``tp`` holds of a row: one per source, or one for all where they are
    interleaved.
    """
    parts = [(_position(row, part), part) for part in row.slices(tp, rank)]
    runs = [parts] if row.groups else [[part] for part in parts]
    found = []
    for run in filter(None, runs):
        first = run[0][0]
        moved = tuple(Slice(part.source, part.source_start, start - first, part.length) for start, part in run)
        found.append(Chunk(row, first, sum(part.length for part in moved), moved))
    return tuple(found)


def _position(row: Row, part: Slice) -> int:
    """Where a slice begins in the row's global tensor, which is the parameter at TP 1."""
    for whole in row.slices(1, 0):
        offset = part.source_start - whole.source_start
        if whole.source == part.source and 0 <= offset < whole.length:
            return whole.start + offset
    raise ValueError(f"{row}: {part} is no part of the whole")


# --- writing


def write(descriptor: int, start: int, name: str, tensor: torch.Tensor, leading: int) -> tuple[int, int]:
    """Write a contiguous tensor, behind ``leading`` axes of size 1, as one record at ``start``; its length and
    checksum.
    """
    before, after = _frame((1,) * leading + tuple(tensor.shape), tensor.dtype)
    os.pwrite(descriptor, before, start)
    checksum = put(descriptor, start + len(before), name, tensor)
    os.pwrite(descriptor, after, start + len(before) + tensor.nbytes)
    return len(before) + tensor.nbytes + len(after), checksum


@functools.lru_cache(maxsize=256)
def _frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the values of a tensor, which ``put`` then writes and sums in one
    pass.
    """
    frame = _Frame()
    with skip_data(), serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(torch.empty(shape, dtype=dtype), cast("IO[bytes]", frame))
    before, after = map(bytes, frame.parts)
    return before, after


class _Frame:
    """A file for torch.save, which steps over the values."""

    def __init__(self) -> None:
        self.parts = [bytearray()]

    def write(self, data: bytes) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        self.parts.append(bytearray())

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class Record:
    """One written chunk."""

    chunk: Chunk
    dtype: torch.dtype
    file: str
    start: int
    nbytes: int


def finish(directory: Path, records: Iterable[Record], model: Architecture) -> None:
    """Write ``.metadata``, ``common.pt`` and, last, ``metadata.json``: the folder is then a checkpoint."""
    tensors: dict[str, TensorStorageMetadata] = {}
    extras: dict[str, BytesStorageMetadata] = {}
    results = []
    extra = io.BytesIO()
    # Linear layers ask for an extra state (Transformer Engine's FP8 scales): one record for all.
    torch.save([None], extra)
    (directory / _EXTRA_FILE).write_bytes(extra.getvalue())
    for record in records:
        place = stored(record.chunk.row, model)
        begin = [0] * len(place.shape)
        begin[record.chunk.row.dim] = record.chunk.start
        offsets = torch.Size((*place.index, *begin))
        box = ChunkStorageMetadata(offsets, torch.Size((1,) * len(place.axes) + record.chunk.shape))
        for key in place.keys:
            size = torch.Size(place.axes + place.shape)
            properties = TensorProperties(dtype=record.dtype)
            tensors.setdefault(key, TensorStorageMetadata(properties, size, [])).chunks.append(box)
            info = _StorageInfo(record.file, record.start, record.nbytes)
            results.append(WriteResult(MetadataIndex(key, offsets), record.nbytes, info))
        if (state := _extra_state(place)) and state not in extras:
            extras[state] = BytesStorageMetadata()
            info = _StorageInfo(_EXTRA_FILE, 0, len(extra.getvalue()))
            results.append(WriteResult(MetadataIndex(state), info.length, info))
    FileSystemWriter(directory).finish(Metadata({**tensors, **extras}), [results])
    torch.save({}, directory / "common.pt")
    (directory / CONFIG).write_text(json.dumps(_CONFIG))


def _extra_state(place: Stored) -> str | None:
    """Key of the extra state that goes with a linear layer's weight (megatron-core: ``ShardedObject.unique_key``)."""
    module, _, kind = place.keys[0].rpartition(".")
    if kind != "weight" or not module.rpartition(".")[2].startswith(("linear_", "in_proj", "out_proj")):
        return None
    offset, shape = (".".join(map(str, numbers)) for numbers in (place.index or (0,), place.axes or (1,)))
    return f"{module}._extra_state/shard_{offset}_{shape}"


# --- reading


def find(path: Path) -> Path:
    """The ``torch_dist`` folder that a path means: itself, a training run's checkpoint, or the newest one of a run.

    Raises ``ValueError`` where there is none.
    """
    steps = [*path.glob("checkpoints/step-*"), *path.glob("step-*"), *path.glob("iter_*")]
    for folder in (path, path / "learner", *sorted(steps, reverse=True)):
        for candidate in (folder, folder / "learner"):
            if (candidate / CONFIG).is_file():
                return candidate
    raise ValueError(
        f"{path} holds no Megatron checkpoint: neither it nor its newest checkpoint has {CONFIG}; "
        "give a checkpoint, a step-N folder or a run"
    )


class Checkpoint:
    """The rows of a model in a ``torch_dist`` checkpoint, at whatever layout it was written. Reads slices, not files.

    Where the checkpoint has adapters (``adapters``, by the parameter that each is of), ``read`` adds them.

    Raises ``ValueError`` where the checkpoint is of another format or not of this model: names tensor, shapes and row.
    """

    def __init__(self, directory: Path, model: Architecture, rows: Sequence[Row]) -> None:
        config = json.loads((directory / CONFIG).read_text())
        if config.get("sharded_backend") != "torch_dist":
            raise ValueError(f"{directory} has format {config.get('sharded_backend')!r}; only 'torch_dist' can be read")
        self.path = directory
        self._described = functools.lru_cache(maxsize=4096)(_described)  # interleaved tensors share a record
        metadata = read_metadata(directory)
        self._tensors = {
            canonical(key): (key, entry)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.lora = lora.recorded(directory)
        self.adapters = {each.base.parameter: each for each in lora.adapters(model, Grid(), self.lora)}
        rows = [*rows, *(row for each in self.adapters.values() for row in (each.a, each.b))]
        self._places = {row.parameter: self._find(row, model) for row in rows}
        self._refuse_extra(model)
        self._boxes: dict[tuple[str, tuple[int, ...]], list[tuple[ChunkStorageMetadata, _StorageInfo]]] = defaultdict(
            list
        )
        axes = {key: len(place.axes) for key, place in self._places.values()}
        for key, entry in metadata.state_dict_metadata.items():
            for chunk in entry.chunks if key in axes and isinstance(entry, TensorStorageMetadata) else ():
                info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                self._boxes[key, tuple(chunk.offsets[: axes[key]])].append((chunk, info))

    def _find(self, row: Row, model: Architecture) -> tuple[str, Stored]:
        """The key that the checkpoint has for a row, stacked over layers or not, and its place there."""
        for stacked in (True, False):
            place = stored(row, model, stacked)
            name = canonical(place.keys[0])
            if name not in self._tensors:
                continue
            key, entry = self._tensors[name]
            size, expected = tuple(entry.size), place.axes + place.shape
            dim = len(place.axes) + row.dim
            padded = row.layer is None and row.split is not None and size[dim : dim + 1] > expected[dim : dim + 1]
            if size != expected and not (
                padded and size[:dim] + size[dim + 1 :] == expected[:dim] + expected[dim + 1 :]
            ):
                raise ValueError(
                    f"{self.path}: {key} has shape {list(size)}, config.json asks for {list(expected)}; needed by {row}"
                )
            return key, place
        raise ValueError(f"{self.path} lacks the tensor {stored(row, model).keys[0]}; needed by {row}")

    def _refuse_extra(self, model: Architecture) -> None:
        used = {canonical(key) for key, _ in self._places.values()}
        parts = ("decoder.", "embedding.", "output_layer.")  # the policy's; beside it optimizer, reference policy, RNG
        if extra := sorted(name for name in self._tensors if name.startswith(parts) and name not in used):
            raise ValueError(
                f"{self.path} holds {len(extra)} tensors that {model.family.name} does not have: {', '.join(extra[:5])}"
                f"{', ...' if len(extra) > 5 else ''}; is this the config.json of the checkpoint?"
            )

    def dtype(self, row: Row) -> torch.dtype:
        """Type of a row."""
        return self._tensors[canonical(self._places[row.parameter][0])][1].properties.dtype

    def read(self, row: Row, source: int) -> torch.Tensor:
        """Hugging Face tensor ``source`` of a row, its adapter added; a view of the file where there is no adapter and
        the tensor lies there in one piece.
        """
        values, adapter = self.stored(row, source), self.adapters.get(row.parameter)
        if adapter is None or source not in adapter.sources:
            return values
        a, b = self.stored(adapter.a, adapter.sources.index(source)), self.stored(adapter.b, source)
        return merge(values, b, a, self.lora.scale)

    def stored(self, row: Row, source: int) -> torch.Tensor:
        """As ``read``, without adapters; ``row`` may be an adapter's."""
        parts = [part for part in row.slices(1, 0) if part.source == source]
        if len(parts) == 1:
            return self.box(row, parts[0].start, parts[0].length)
        whole = torch.empty(row.sources[source].shape, dtype=self.dtype(row))
        for part in parts:
            whole.narrow(row.dim, part.source_start, part.length).copy_(self.box(row, part.start, part.length))
        return whole

    def box(self, row: Row, start: int, length: int) -> torch.Tensor:
        """Entries ``[start, start + length)`` of a row's tensor along ``row.dim``, from the records that hold them."""
        key, place = self._places[row.parameter]
        shape = list(place.shape)
        shape[row.dim] = length
        wanted = [(0, size) for size in shape]
        wanted[row.dim] = (start, start + length)
        whole, covered = None, 0
        for chunk, info in self._boxes[key, place.index]:
            held = list(zip(chunk.offsets[len(place.axes) :], chunk.sizes[len(place.axes) :], strict=True))
            common = [
                (max(low, offset), min(high, offset + size))
                for (low, high), (offset, size) in zip(wanted, held, strict=True)
            ]
            if any(low >= high for low, high in common):
                continue
            values = self._record(info, self.dtype(row))
            values = values.reshape([size for _, size in held])
            values = values[tuple(slice(lo - at, hi - at) for (lo, hi), (at, _) in zip(common, held, strict=True))]
            covered += values.numel()
            if common == wanted:
                return values
            whole = torch.empty(shape, dtype=values.dtype) if whole is None else whole
            whole[tuple(slice(lo - at, hi - at) for (lo, hi), (at, _) in zip(common, wanted, strict=True))] = values
        if whole is None or covered != math.prod(shape):
            raise ValueError(
                f"{self.path}: the records of {key} at {list(place.index)} do not cover it; needed by {row}"
            )
        return whole

    def _record(self, info: _StorageInfo, dtype: torch.dtype) -> torch.Tensor:
        """The tensor of one ``torch.save`` record, mapped rather than read."""
        path = self.path / info.relative_path
        start, count, first, size, stride = self._described(path, info.offset, info.length)
        return mapped(path, start, dtype, count).as_strided(size, stride, first)


def _described(path: Path, offset: int, length: int) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]]:
    """Where a record's values begin in the file and how many there are; its tensor's storage offset, shape and
    strides.
    """
    page = offset - offset % mmap.ALLOCATIONGRANULARITY
    # What torch.save writes: a pickle beside the storage, stored uncompressed.
    with (
        path.open("rb") as file,
        _Pages(file.fileno(), offset - page + length, access=mmap.ACCESS_READ, offset=page) as pages,
        zipfile.ZipFile(cast("IO[bytes]", pages)) as archive,
    ):
        infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        begin = {name: _body(pages, infos[name].header_offset) for name in ("data.pkl", "data/0")}
        # Not archive.read(): torch may have left out the checksums that it insists on.
        pickled = pages[begin["data.pkl"] : begin["data.pkl"] + infos["data.pkl"].file_size]
    (_, _, _, _, count), first, size, stride = _Unpickler(io.BytesIO(pickled)).load()
    return page + begin["data/0"], count, first, tuple(size), tuple(stride)


def _body(archive: mmap.mmap, header: int) -> int:
    """Where an uncompressed file begins in a zip archive, given its local header: fixed fields, name, extra field."""
    name, extra = struct.unpack("<HH", archive[header + 26 : header + 30])
    return header + 30 + name + extra


class _Pages(mmap.mmap):
    """A memory map that zipfile accepts before Python 3.13."""

    def seekable(self) -> bool:
        return True


class _Unpickler(pickle.Unpickler):
    """Reads what ``torch.save`` says about one tensor, and nothing else, without its storage."""

    def persistent_load(self, pid: Any) -> Any:
        return pid  # "storage", type, key, location, entries

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, size, stride, *_: (storage, first, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} in a checkpoint record: not a plain tensor")
