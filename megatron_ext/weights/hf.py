"""Hugging Face weights in and out of a sharded Megatron model, both by the slices of ``weights.layout``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.topology import Topology
from pipeline.model.architecture import Architecture
from pipeline.model.checksum import checksum
from pipeline.model.folder import Folder, check
from pipeline.model.fp8 import CODES, quantise
from pipeline.model.fp8_layout import BLOCK, scale_name, scale_shape
from pipeline.model.layout import Row, Slice
from pipeline.reshard.buckets import Bucket, Entry, Rounds
from pipeline.types import WeightBucket


def load(
    parameters: Mapping[str, torch.Tensor],
    rows: Sequence[Row],
    model: Architecture,
    hf_path: Path,
    topology: Topology,
) -> None:
    """Fill this rank's ``parameters`` (under layout names) from a Hugging Face folder, padding with zeros.

    ``rows`` are those of the whole model, so that every rank refuses a folder with missing, misshapen or unknown
    tensors. Raises ``ValueError`` that names the tensor, both shapes and the layout row.
    """
    folder = Folder(hf_path)
    check(folder, rows, model)
    mine = {row: part for row in rows if (part := row.part(topology.grid, topology.rank))}
    if unmatched := set(parameters) ^ {row.parameter for row in mine}:
        raise ValueError(f"model and layout table disagree on {', '.join(sorted(unmatched))}")
    for row, (count, index) in mine.items():
        parameter = parameters[row.parameter].data
        if tuple(parameter.shape) != row.local_shape(count):
            raise ValueError(f"{row}: the model has {list(parameter.shape)}, the table {list(row.local_shape(count))}")
        parameter.zero_()
        for piece in row.slices(count, index):
            values = folder.read(row.sources[piece.source].name, row.dim, piece.source_start, piece.length)
            parameter.narrow(row.dim, piece.start, piece.length).copy_(values)


def export(
    parameters: Mapping[str, torch.Tensor],
    rounds: Rounds,
    topology: Topology,
    version: int,
) -> Iterator[WeightBucket | None]:
    """The weights as full tensors under Hugging Face names, one item a round on every rank: the bucket that it owns, or
    ``None``.

    A collective of all ranks, though only a bucket's holders exchange messages. In a round all of them are under way at
    once, and each pair of ranks exchanges one each way at most: nobody waits for a rank that waits for another. A round
    takes up to three times the size of a bucket on a rank: what it sends, what it receives, its own bucket. The tensors
    are copies: training may go on while they travel.
    """
    if topology.backend == "nccl":
        dist.barrier()  # NCCL sets its communicator up in the first call that all ranks make
    count = sum(len(buckets) for buckets in rounds)
    for buckets in rounds:
        own = next((bucket for bucket in buckets if bucket.owner == topology.rank), None)
        shards = _exchange(parameters, buckets, own, topology)
        if own is None:
            yield None
            continue
        tensors = _assemble(own, shards, parameters)
        yield WeightBucket(version, own.index, count, tensors, checksum(tensors))


@dataclass(frozen=True)
class _Part:
    """What one holder contributes to one tensor that is gathered: entries ``start ..`` along ``dim``."""

    name: str
    dim: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a message; whole fours, so that every part begins where its type may."""
        return -(-torch.Size(self.shape).numel() * self.dtype.itemsize // 4) * 4


@torch.no_grad()
def _exchange(
    parameters: Mapping[str, torch.Tensor], buckets: Sequence[Bucket], own: Bucket | None, topology: Topology
) -> list[list[tuple[_Part, torch.Tensor]]]:
    """Every holder's parts of ``own``, after this rank has sent its parts of the other buckets of the round."""
    dtype, device = next(iter(parameters.values())).dtype, topology.device
    operations, received = [], []
    for bucket in buckets:
        if bucket is own or topology.rank not in bucket.holders:
            continue
        message, views = _message(list(_parts(bucket, topology.rank, dtype)), device)
        for (_, view), values in zip(views, _values(parameters, bucket, topology.rank), strict=True):
            view.copy_(values)
        if message.numel():
            operations.append(dist.P2POp(dist.isend, message, bucket.owner))
    for bucket, holder in [(own, holder) for holder in own.holders] if own else []:
        if holder == topology.rank:
            received.append(list(zip(_parts(bucket, holder, dtype), _values(parameters, bucket, holder), strict=True)))
            continue
        message, views = _message(list(_parts(bucket, holder, dtype)), device)
        received.append(views)
        if message.numel():
            operations.append(dist.P2POp(dist.irecv, message, holder))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received


def _message(parts: Sequence[_Part], device: torch.device) -> tuple[torch.Tensor, list[tuple[_Part, torch.Tensor]]]:
    """A buffer for ``parts``, and a view of it for each."""
    buffer = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8, device=device)
    sizes = [torch.Size(part.shape).numel() * part.dtype.itemsize for part in parts]
    chunks = buffer.split([part.nbytes for part in parts])
    return buffer, [
        (part, chunk[:size].view(part.dtype).view(part.shape))
        for part, chunk, size in zip(parts, chunks, sizes, strict=True)
    ]


def _slices(bucket: Bucket, entry: Entry, rank: int) -> list[Slice]:
    """Slices of a tensor that ``rank`` contributes; of what all holders have alike, the owner's own."""
    row = entry.piece.row
    if row.split is None and rank != bucket.owner:
        return []
    found = row.slices(len(bucket.holders), bucket.holders.index(rank))
    return [part for part in found if part.source == entry.piece.source]


def _parts(bucket: Bucket, rank: int, dtype: torch.dtype) -> Iterator[_Part]:
    """What ``rank`` contributes, in the order of :func:`_values`."""
    for entry in bucket.entries:
        piece, dim = entry.piece, entry.piece.row.dim
        slices = _slices(bucket, entry, rank)
        if entry.quantise == "before" and slices:
            start, length = slices[0].source_start, sum(part.length for part in slices)
            shape = _resized(piece.shape, dim, length)
            yield _Part(piece.name, dim, start, shape, CODES)
            yield _Part(scale_name(piece.name), dim, start // BLOCK[dim], scale_shape(shape), torch.float32)
            continue
        for part in slices:
            kept = torch.float32 if piece.row.float32 else dtype
            yield _Part(piece.name, dim, part.source_start, _resized(piece.shape, dim, part.length), kept)


def _values(parameters: Mapping[str, torch.Tensor], bucket: Bucket, rank: int) -> Iterator[torch.Tensor]:
    """The contents of :func:`_parts`: views of ``parameters``, or fresh codes and scales."""
    for entry in bucket.entries:
        row, slices = entry.piece.row, _slices(bucket, entry, rank)
        views = [parameters[row.parameter].narrow(row.dim, part.start, part.length) for part in slices]
        if entry.quantise == "before" and views:
            yield from quantise(torch.cat(views, row.dim), name=entry.piece.name)
        else:
            yield from views


@torch.no_grad()
def _assemble(
    bucket: Bucket, shards: Sequence[Sequence[tuple[_Part, torch.Tensor]]], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The bucket's tensors as they leave; each owns its memory."""
    example = next(iter(parameters.values()))
    tensors: dict[str, torch.Tensor] = {}
    for entry in bucket.entries:
        name, shape = entry.piece.name, entry.piece.shape
        if entry.quantise == "before":
            tensors[name] = example.new_empty(shape, dtype=CODES)
            tensors[scale_name(name)] = example.new_empty(scale_shape(shape), dtype=torch.float32)
        else:
            tensors[name] = example.new_empty(shape, dtype=torch.float32 if entry.piece.row.float32 else example.dtype)
    for parts in shards:
        for part, values in parts:
            tensors[part.name].narrow(part.dim, part.start, part.shape[part.dim]).copy_(values)
    for entry in bucket.entries:
        if entry.quantise == "after":
            name = entry.piece.name
            tensors[name], tensors[scale_name(name)] = quantise(tensors[name], name=name)
    return tensors


def _resized(shape: tuple[int, ...], dim: int, length: int) -> tuple[int, ...]:
    return (*shape[:dim], length, *shape[dim + 1 :])
