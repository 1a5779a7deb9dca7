"""Hugging Face weights in and out of a sharded Megatron model, both by the slices of ``weights.layout``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.architecture import Architecture
from megatron_ext.topology import Topology
from megatron_ext.weights import safetensors_io
from megatron_ext.weights.layout import Piece, Row, Slice
from pipeline.checksum import checksum
from pipeline.types import WeightBucket


def load(
    parameters: Mapping[str, torch.Tensor],
    rows: Sequence[Row],
    model: Architecture,
    hf_path: Path,
    topology: Topology,
) -> None:
    """Fill this rank's ``parameters`` (under layout names) from a Hugging Face folder, padding with zeros.

    ``rows`` are those of the whole model, so that every rank refuses a folder with missing, misshapen or unknown tensors.
    Raises ``ValueError`` that names the tensor, both shapes and the layout row.
    """
    folder = safetensors_io.Folder(hf_path)
    safetensors_io.check(folder, rows, model)
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


def plan(rows: Sequence[Row], itemsize: int, bucket_mib: float) -> tuple[tuple[Piece, ...], ...]:
    """Buckets of an export in order: each of one type, held by the same ranks and at most ``bucket_mib`` MiB, or a single tensor.

    The same on every rank, and known without communication.
    """
    limit = bucket_mib * 2**20
    buckets: list[list[Piece]] = []
    size, last = 0, None
    for piece in (Piece(row, source) for row in rows if row.exported for source in range(len(row.sources))):
        nbytes = (4 if piece.row.float32 else itemsize) * torch.Size(piece.shape).numel()
        kind = (piece.row.stage, piece.row.ep, piece.row.float32)
        if kind != last or size + nbytes > limit:
            buckets.append([])
            size, last = 0, kind
        buckets[-1].append(piece)
        size += nbytes
    return tuple(tuple(bucket) for bucket in buckets)


def export(
    parameters: Mapping[str, torch.Tensor],
    buckets: Sequence[Sequence[Piece]],
    topology: Topology,
    version: int,
) -> Iterator[WeightBucket | None]:
    """The weights as full tensors under Hugging Face names, bucket by bucket, on global rank 0; ``None`` on the other ranks.

    A collective of the first replica (the others take no part): every rank that holds a part of a bucket sends it to rank 0.
    The tensors are copies: training may go on while they travel.
    """
    for index, bucket in enumerate(buckets):
        shards = _collect(parameters, bucket, topology)
        if shards is None:
            yield None
            continue
        tensors = {piece.name: tensor for piece, tensor in zip(bucket, _assemble(bucket, shards), strict=True)}
        yield WeightBucket(version, index, len(buckets), tensors, checksum(tensors))


@torch.no_grad()
def _collect(
    parameters: Mapping[str, torch.Tensor], bucket: Sequence[Piece], topology: Topology
) -> list[torch.Tensor] | None:
    """Every holder's part of ``bucket``, flat, on global rank 0, ``None`` elsewhere."""
    holders = bucket[0].row.holders(topology.grid)
    own = next(iter(parameters.values())).new_empty(0)  # of the model's type
    if bucket[0].row.float32:
        own = own.float()
    if topology.rank in holders:
        parts = _parts(bucket, len(holders), holders.index(topology.rank))
        slices = (parameters[piece.row.parameter].narrow(piece.row.dim, s.start, s.length) for piece, s in parts)
        own = torch.cat([own, *(part.reshape(-1) for part in slices)])
    if topology.rank != 0:
        if own.numel():
            dist.send(own, 0)
        return None
    shards, requests = [], []
    for index, rank in enumerate(holders):
        shards.append(own if rank == 0 else own.new_empty(_size(bucket, len(holders), index)))
        if rank != 0 and shards[-1].numel():
            requests.append(dist.irecv(shards[-1], rank))
    for request in requests:
        assert request is not None  # rank 0 is of the group
        request.wait()
    return shards


def _parts(bucket: Sequence[Piece], count: int, index: int) -> Iterator[tuple[Piece, Slice]]:
    """What the ``index``-th of ``count`` holders sends of a bucket, in order; of what all hold alike, the first sends it."""
    for piece in bucket:
        if piece.row.split is not None or index == 0:
            yield from ((piece, part) for part in piece.row.slices(count, index) if part.source == piece.source)


def _size(bucket: Sequence[Piece], count: int, index: int) -> int:
    return sum(_shape(piece, part).numel() for piece, part in _parts(bucket, count, index))


def _shape(piece: Piece, part: Slice) -> torch.Size:
    """Shape of one slice of a tensor."""
    return torch.Size((*piece.shape[: piece.row.dim], part.length, *piece.shape[piece.row.dim + 1 :]))


def _assemble(bucket: Sequence[Piece], shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Full tensors from the flat parts of all holders; each owns its memory."""
    tensors = {piece: shards[0].new_empty(piece.shape) for piece in bucket}
    for index, shard in enumerate(shards):
        start = 0
        for piece, part in _parts(bucket, len(shards), index):
            shape = _shape(piece, part)
            values = shard[start : start + shape.numel()].view(shape)
            tensors[piece].narrow(piece.row.dim, part.source_start, part.length).copy_(values)
            start += shape.numel()
    return list(tensors.values())
