"""Hugging Face folders to megatron-core's ``torch_dist`` checkpoints and back: streaming, in parallel, resumable.

Both directions cut the work into parts of about ``PART_BYTES`` and hold one tensor per worker, all workers together
never more than twice the largest tensor (or ``LEAST_BUDGET``). No megatron here but for the comparison of logits.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.weights import peft, torch_dist
from megatron_ext.weights.parts import Budget, ConversionError, Work
from megatron_ext.weights.verify import MANIFEST, in_hf
from megatron_ext.weights.verify import verify as compare
from pipeline.config.load import load_config, resolve_path
from pipeline.model import architecture, fp8, fp8_layout, identity, layout, stacked
from pipeline.model.architecture import Architecture, read_config, read_whole_config
from pipeline.model.folder import Files, Folder, check, finite, in_groups, is_weights, nbytes_of
from pipeline.model.grid import Grid
from pipeline.model.layout import Piece, Row, Slice
from pipeline.units import GIB

PART_BYTES = 64 * 2**20, GIB  # least and most; between, a sixteenth of the model
LEAST_BUDGET = 128 * 2**20  # bytes
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEPT = "hf"  # folder of a checkpoint: all of the Hugging Face folder it was made of but the weights
FP8 = "fp8"  # of a Hugging Face folder only: matrices in blocks, the rest in bfloat16
# Kept as they are whatever --dtype: megatron-core and transformers hold these in float32 in every model.
_EXACT = (".router.expert_bias",)

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done since the last call, bytes in all


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    out: str
    tensors: int
    bytes: int
    seconds: float
    parts: int
    resumed_parts: int  # finished by an earlier attempt
    verified: str  # what --verify compared
    adapter: str = ""  # PEFT folder of the adapters, where the checkpoint has any


@dataclass(frozen=True)
class _Part:
    """Records of one rank, for one file."""

    file: str
    chunks: tuple[torch_dist.Chunk, ...]
    nbytes: int


def hf_to_megatron(
    hf: Path,
    out: Path,
    grid: Grid | None = None,
    dtype: str | None = None,
    workers: int = 4,
    verify: bool = False,
    progress: Progress = lambda done, total: None,
    part_bytes: int | None = None,
) -> Report:
    """Write a Hugging Face folder as a ``torch_dist`` checkpoint cut for ``grid``; it loads at any layout.

    The folder ``KEPT`` of the checkpoint gets configuration, tokenizer and all else but weights, for the way back.
    ``dtype`` "fp32" or "bf16" casts; ``None`` keeps the folder's types. Called again after a kill, it goes on where it
    was. Raises ``ValueError`` for a folder, layout or ``out`` that cannot be used, ``ConversionError`` where writing or
    verifying fails.
    """
    start = time.perf_counter()
    model = architecture.read(hf)
    grid = _with_end_stages(grid or Grid(), model.layers)
    model.check_layout(grid)
    rows = [row for row in layout.rows(model, grid) if row.exported]
    folder = Folder(hf, model)
    check(folder, rows, model)
    types = {row.parameter: _type_of(row, folder, dtype) for row in rows}
    part_bytes = part_bytes or _part_bytes(sum(nbytes_of(types[row.parameter], row.local_shape(1)) for row in rows))
    parts = _parts(rows, grid, types, part_bytes)
    settings = {
        "source": str(hf.resolve()),
        "files": _stamps(hf / file for file in {entry.file for entry in folder.entries.values()}),
        "model": model.record(),
        "grid": asdict(grid),
        "dtype": dtype,
        "part_bytes": part_bytes,
    }
    total = sum(part.nbytes for part in parts)
    largest = max(_held(s.shape, types[row.parameter], folder.dtype(s.name)) for row in rows for s in row.sources)
    budget = Budget(max(largest, LEAST_BUDGET))
    with Work(out, settings) as work:
        resumed = len(work.finished)
        _require_space(work, total - sum(parts[index].nbytes for index in work.finished))
        write = functools.partial(_write_part, work.folder, folder, model, types, budget)
        results = work.run(
            [part.nbytes for part in parts], lambda i: write(parts[i]), workers, lambda done: progress(done, total)
        )
        records = [
            torch_dist.Record(chunk, types[chunk.row.parameter], part.file, entry["start"], entry["nbytes"])
            for part, entries in zip(parts, results, strict=True)
            for chunk, entry in zip(part.chunks, entries, strict=True)
        ]
        _remove_others(work.folder, {part.file for part in parts})
        identity.record(work.folder, model)
        _copy_rest(hf, work.folder / KEPT)
        _write_manifest(work.folder, hf, [entry for entries in results for entry in entries])
        torch_dist.finish(work.folder, records, model)
        said = compare(work.folder, hf, work.folder, model, rows, workers, budget) if verify else ""
        work.publish()
    return Report(str(out), len(records), total, time.perf_counter() - start, len(parts), resumed, said)


def _with_end_stages(grid: Grid, layers: int) -> Grid:
    """``grid``; where its stages cannot hold equally many layers, with the rest in the first and the last one."""
    each, rest = divmod(layers, grid.pp)
    if not each or not rest or grid.first_stage_layers is not None or grid.last_stage_layers is not None:
        return grid
    return replace(grid, first_stage_layers=each + rest - rest // 2, last_stage_layers=each + rest // 2)


def _type_of(row: Row, folder: Folder, dtype: str | None) -> torch.dtype:
    """The type in which a row is written; sources of several types get one that holds them all."""
    own = functools.reduce(torch.promote_types, (folder.dtype(source.name) for source in row.sources))
    return own if dtype is None or row.parameter.endswith(_EXACT) else DTYPES[dtype]


def _parts(rows: Sequence[Row], grid: Grid, types: Mapping[str, torch.dtype], limit: int) -> list[_Part]:
    """What every rank holds, once per replicated row, in files of at most ``limit`` bytes or one larger record."""
    held: dict[int, list[torch_dist.Chunk]] = {}
    for row in rows:
        ranks = row.holders(grid)
        for index, rank in enumerate(ranks if row.split is not None else ranks[:1]):
            held.setdefault(rank, []).extend(torch_dist.chunks(row, len(ranks), index))
    parts = []
    for rank, chunks in sorted(held.items()):
        sizes = [nbytes_of(types[chunk.row.parameter], chunk.shape) for chunk in chunks]
        for number, group in enumerate(in_groups(sizes, limit)):
            name = f"__{rank}_{number}.distcp"  # as torch.distributed.checkpoint names them
            parts.append(_Part(name, tuple(chunks[i] for i in group), sum(sizes[i] for i in group)))
    return parts


def _held(shape: Sequence[int], dtype: torch.dtype, source: torch.dtype) -> int:
    """Bytes in memory while a tensor is converted: the source's pages or a copy, and what is made of them."""
    return 2 * math.prod(shape) * max(dtype.itemsize, source.itemsize)


def _part_bytes(total: int) -> int:
    """Size of a part: the model's alone decides, so that any number of workers can take up the work of any other."""
    least, most = PART_BYTES
    return min(most, max(least, total // 16))


def _write_part(
    work: Path,
    folder: Folder,
    model: Architecture,
    types: Mapping[str, torch.dtype],
    budget: Budget,
    part: _Part,
) -> list[dict[str, Any]]:
    """One file, record by record, complete on disk before it has its name; where each record is, and its checksum."""
    entries, end = [], 0
    partial = work / f"{part.file}.partial"
    with partial.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, part.nbytes)  # a full disk is found here
        for chunk in part.chunks:
            name, dtype = chunk.row.parameter, types[chunk.row.parameter]
            with budget.hold(_held(chunk.shape, dtype, folder.dtype(chunk.row.sources[0].name))):
                tensor, leading = _values(folder, chunk, dtype), len(torch_dist.stored(chunk.row, model).axes)
                nbytes, crc = torch_dist.write(file.fileno(), end, name, tensor, leading)
                del tensor
            entry = {"parameter": name, "offset": chunk.start, "shape": list(chunk.shape), "dtype": str(dtype)}
            entries.append(entry | {"start": end, "nbytes": nbytes, "checksum": crc})
            end += nbytes
        os.fsync(file.fileno())
    partial.rename(work / part.file)
    return entries


def _values(folder: Folder, chunk: torch_dist.Chunk, dtype: torch.dtype) -> torch.Tensor:
    """A chunk's values, contiguous and finite: the file's own pages where it is one unchanged slice of one tensor."""
    row = chunk.row

    def view(part: Slice) -> torch.Tensor:
        name = row.sources[part.source].name
        values = folder.read(name, row.dim, part.source_start, part.length)
        folder.require_finite(name, values)
        return values

    if len(chunk.slices) == 1:
        return view(chunk.slices[0]).to(dtype).contiguous()
    values = torch.empty(chunk.shape, dtype=dtype)
    for part in chunk.slices:
        values.narrow(row.dim, part.start, part.length).copy_(view(part))
    return values


def megatron_to_hf(
    checkpoint: Path,
    hf: Path,
    out: Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    workers: int = 4,
    verify: bool = False,
    progress: Progress = lambda done, total: None,
    part_bytes: int | None = None,
) -> Report:
    """Write a ``torch_dist`` checkpoint, ours or a training run's, as a Hugging Face folder.

    ``checkpoint`` is anything that ``torch_dist.find`` understands; configuration, tokenizer and all else but
    weights is copied from ``hf``: the Hugging Face folder of the same model, or what ``hf_to_megatron`` ``KEPT`` of it.
    ``dtype`` "fp32" or "bf16" casts, "fp8" quantises the matrices of ``fp8_layout.quantised`` in 128x128 blocks and
    makes the rest bfloat16; ``None`` keeps the checkpoint's types. Adapters are added to the weights, and written
    beside them as PEFT has them (``peft.FOLDER``). Resumes and raises like ``hf_to_megatron``.
    """
    start = time.perf_counter()
    directory = torch_dist.find(checkpoint)
    model = architecture.read(hf)
    identity.check(directory, model, str(hf / "config.json"))
    if dtype == FP8 and model.family.stacked:
        raise ValueError(
            f"--dtype fp8 is not supported for {model.family.name}, whose experts share tensors: use bf16 or fp32"
        )
    rows = [row for row in layout.rows(model) if row.exported]
    source = torch_dist.Checkpoint(directory, model, rows)
    types = {row.parameter: _type_in_hf(row, source, dtype) for row in rows}
    tensors = [_Tensor(row, number, types[row.parameter]) for row in rows for number in range(len(row.sources))]
    total = sum(tensor.nbytes for tensor in tensors)
    part_bytes = part_bytes or _part_bytes(total)
    parts = [[tensors[i] for i in group] for group in in_groups([tensor.nbytes for tensor in tensors], part_bytes)]
    settings = {
        "source": str(directory.resolve()),
        "files": _stamps([*directory.glob("*.distcp"), directory / ".metadata"]),
        "hf": str(hf.resolve()),
        "model": model.record(),
        "dtype": dtype,
        "shard_bytes": shard_bytes,
        "part_bytes": part_bytes,
    }
    largest = max(_held(tensor.shape, tensor.dtype, source.dtype(tensor.row)) for tensor in tensors)
    budget = Budget(max(largest, LEAST_BUDGET))
    with Work(out, settings) as work:
        resumed = len(work.finished)
        places = {name: place for tensor in tensors for name, place in tensor.places.items()}
        files = Files(work.folder, places, shard_bytes, stacked.written(model))
        _allocate(work, files, resumed)
        with closing(files):
            results = work.run(
                [sum(tensor.nbytes for tensor in part) for part in parts],
                lambda i: _write_tensors(files, source, budget, parts[i]),
                workers,
                lambda done: progress(done, total),
            )
        _copy_rest(hf, work.folder)
        if source.adapters:
            peft.write(work.folder / peft.FOLDER, source, hf)
        _describe_weights(work.folder, set(types.values()))
        _write_manifest(work.folder, directory, [entry for entries in results for entry in entries])
        said = compare(directory, work.folder, work.folder, model, rows, workers, budget) if verify else ""
        work.publish()
    adapter = str(out / peft.FOLDER) if source.adapters else ""
    return Report(str(out), len(tensors), total, time.perf_counter() - start, len(parts), resumed, said, adapter)


@dataclass(frozen=True)
class _Tensor(Piece):
    """One Hugging Face tensor, and the type in which it is written."""

    dtype: torch.dtype

    @property
    def places(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what is written for it: itself and, in FP8, its scales."""
        places = {self.name: (self.dtype, self.shape)}
        if self.dtype == fp8.CODES:
            places[fp8_layout.scale_name(self.name)] = torch.float32, fp8_layout.scale_shape(self.shape)
        return places

    @property
    def nbytes(self) -> int:
        return sum(nbytes_of(*place) for place in self.places.values())


def model_of(checkpoint: Path) -> Path:
    """What describes a checkpoint's model: kept in it by ``hf_to_megatron``, or ``model.hf_path`` of its run.

    Raises ``ValueError`` where there is neither.
    """
    kept = torch_dist.find(checkpoint) / KEPT
    if kept.is_dir():
        return kept
    for folder in (checkpoint, *checkpoint.resolve().parents[:3]):
        if (folder / "config.yaml").is_file():
            return resolve_path(load_config(folder / "config.yaml", [], check=False).model.hf_path)
    raise ValueError(
        f"--checkpoint {checkpoint} holds no {KEPT}/ and is not in a run with a config.yaml: "
        "give --hf with its config.json and tokenizer"
    )


def _type_in_hf(row: Row, source: torch_dist.Checkpoint, dtype: str | None) -> torch.dtype:
    """The type in which a row is written to a Hugging Face folder."""
    if dtype is None or row.parameter.endswith(_EXACT):
        return source.dtype(row)
    if dtype == FP8:
        return fp8.CODES if fp8_layout.quantised(row) else torch.bfloat16
    return DTYPES[dtype]


def _write_tensors(
    files: Files, source: torch_dist.Checkpoint, budget: Budget, part: Sequence[_Tensor]
) -> list[dict[str, Any]]:
    """One part, complete on disk when this returns; every tensor's checksum."""
    entries = []
    for tensor in part:
        with budget.hold(_held(tensor.shape, tensor.dtype, source.dtype(tensor.row))):
            made = in_hf(tensor.name, source.read(tensor.row, tensor.source), tensor.dtype)
            for name, values in made.items():
                if values.dtype.itemsize > 1 and not finite(values):
                    raise ValueError(f"{name} holds NaN or infinite values: convert an earlier checkpoint of the run")
                entry = {"name": name, "shape": list(values.shape), "dtype": str(values.dtype)}
                entries.append(entry | {"checksum": files.write(name, values)})
            del made, values
    files.flush()
    return entries


def _allocate(work: Work, files: Files, resumed: int) -> None:
    """Create the output's files at full size; what finished parts wrote stays."""
    try:
        if not resumed:
            _require_space(work, files.nbytes)
        files.allocate()
    except OSError as error:
        raise ConversionError(f"{work.out} could not be written: {error.strerror or error}; make room") from error


def _require_space(work: Work, nbytes: int) -> None:
    """Refuse before any work where the disk is plainly too small."""
    free = shutil.disk_usage(work.folder).free
    if nbytes > free:
        raise ConversionError(
            f"{work.out} needs {nbytes / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free: make room, or "
            "choose another --out"
        )


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Sizes and times of the files that are read: a conversion is not resumed on others."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}


def _remove_others(folder: Path, names: set[str]) -> None:
    """Drop what earlier attempts left half-written."""
    for path in folder.glob("*.distcp*"):
        if path.name not in names:
            path.unlink()


def _copy_rest(hf: Path, folder: Path) -> None:
    """All files of a Hugging Face folder but its weights."""
    folder.mkdir(exist_ok=True)
    for path in sorted(hf.iterdir()):
        if path.is_file() and path.name != MANIFEST and not is_weights(path):
            shutil.copyfile(path, folder / path.name)


def _describe_weights(folder: Path, types: set[torch.dtype]) -> None:
    """Make the folder's config.json name the type of the weights and how they are quantised."""
    whole, config = read_whole_config(folder), read_config(folder)
    if "text_config" in whole and "text_config" not in config:
        log.warning(
            "%s: model_type %r also sees; its model of text is written alone, as %r",
            folder,
            whole["model_type"],
            config["model_type"],
        )
    narrowest = str(min(types - {fp8.CODES}, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    named = {key: narrowest for key in ("dtype", "torch_dtype") if key in config}
    described = {key: value for key, value in config.items() if key != "quantization_config"} | named
    if config.get("num_nextn_predict_layers"):  # whose layers are left out
        described["num_nextn_predict_layers"] = 0
    if fp8.CODES in types:
        described["quantization_config"] = fp8.quantization_config()
    if described != whole:
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def _write_manifest(folder: Path, source: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    manifest = {"schema": 1, "source": str(source.resolve()), "tensors": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
