"""Hugging Face weights in and out of a sharded Megatron model, both by the slices of ``weights.layout``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_ext.architecture import Architecture
from megatron_ext.topology import Topology
from megatron_ext.weights.layout import Row, ignored
from pipeline.checksum import checksum
from pipeline.types import WeightBucket


class Folder:
    """The tensors of a Hugging Face folder: one ``model.safetensors`` or the files of its index. Reads slices, not files."""

    def __init__(self, hf_path: Path) -> None:
        self.path = hf_path
        index = hf_path / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (hf_path / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise FileNotFoundError(f"{hf_path} has neither model.safetensors nor model.safetensors.index.json")
        self._slices: dict[str, Any] = {}  # lazy: nothing is read before it is indexed
        for file in files:
            handle = safe_open(hf_path / file, framework="pt")
            self._slices.update({name: handle.get_slice(name) for name in handle.keys()})  # noqa: SIM118

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries ``[start, start + length)`` of a tensor along ``dim``."""
        return self._slices[name][(slice(None),) * dim + (slice(start, start + length),)]


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
    folder = Folder(hf_path)
    _check(folder, rows, model)
    mine = [row for row in rows if row.stage == topology.pp_rank]
    if unmatched := set(parameters) ^ {row.parameter for row in mine}:
        raise ValueError(f"model and layout table disagree on {', '.join(sorted(unmatched))}")
    for row in mine:
        parameter = parameters[row.parameter].data
        if tuple(parameter.shape) != row.local_shape(topology.tp_size):
            raise ValueError(
                f"{row}: the model has {list(parameter.shape)}, the table {list(row.local_shape(topology.tp_size))}"
            )
        parameter.zero_()
        for part in row.slices(topology.tp_size, topology.tp_rank):
            values = folder.read(row.sources[part.source].name, row.dim, part.source_start, part.length)
            parameter.narrow(row.dim, part.start, part.length).copy_(values)


def _check(folder: Folder, rows: Sequence[Row], model: Architecture) -> None:
    """Refuse a folder whose tensors are not exactly those of the model."""
    present = folder.names()
    for row in rows:
        for source in row.sources:
            if source.name not in present:
                raise ValueError(f"{folder.path} lacks the tensor {source.name}; needed by {row}")
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


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor of an export: source ``source`` of ``row``."""

    row: Row
    source: int

    @property
    def name(self) -> str:
        """Hugging Face name."""
        return self.row.sources[self.source].name

    @property
    def shape(self) -> tuple[int, ...]:
        """Full shape."""
        return self.row.sources[self.source].shape

    def shard_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of each TP rank's part, padding included."""
        shape = list(self.shape)
        shape[self.row.dim] = self.row.shard_length(self.source, tp)
        return tuple(shape)


def plan(rows: Sequence[Row], itemsize: int, bucket_mib: float) -> tuple[tuple[Piece, ...], ...]:
    """Buckets of an export in order: each within one stage and at most ``bucket_mib`` MiB, or a single larger tensor.

    The same on every rank, and known without communication.
    """
    limit = bucket_mib * 2**20
    buckets: list[list[Piece]] = []
    size = 0
    for piece in (Piece(row, source) for row in rows if row.exported for source in range(len(row.sources))):
        nbytes = itemsize * torch.Size(piece.shape).numel()
        if not buckets or buckets[-1][0].row.stage != piece.row.stage or size + nbytes > limit:
            buckets.append([])
            size = 0
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

    A collective of DP replica 0 (the others take no part): one gather over TP per bucket, then, from later stages, one send to
    rank 0. The tensors are copies: training may go on while they travel.
    """
    for index, bucket in enumerate(buckets):
        shards = _collect(parameters, bucket, topology) if topology.dp_rank == 0 else None
        if shards is None:
            yield None
            continue
        tensors = {piece.name: tensor for piece, tensor in zip(bucket, _assemble(bucket, shards), strict=True)}
        yield WeightBucket(version, index, len(buckets), tensors, checksum(tensors))


def _collect(
    parameters: Mapping[str, torch.Tensor], bucket: Sequence[Piece], topology: Topology
) -> list[torch.Tensor] | None:
    """Every TP rank's flat part of ``bucket`` on global rank 0, ``None`` elsewhere."""
    stage, tp = bucket[0].row.stage, topology.tp_size
    shards: torch.Tensor | None = None
    if topology.pp_rank == stage:
        flat = _flatten(parameters, bucket, topology)
        if tp == 1:
            shards = flat[None]
        else:
            shards = flat.new_empty(tp, flat.numel()) if topology.tp_rank == 0 else None
            gathered = None if shards is None else list(shards.unbind())
            dist.gather(flat, gathered, group=topology.tp_group, group_dst=0)
    if topology.tp_rank != 0:
        return None
    if stage != 0 and topology.pp_rank == stage:
        assert shards is not None
        dist.send(shards, group=topology.pp_group, group_dst=0)
    elif stage != 0 and topology.pp_rank == 0:
        some = next(iter(parameters.values()))
        shards = some.new_empty(tp, sum(torch.Size(piece.shard_shape(tp)).numel() for piece in bucket))
        dist.recv(shards, group=topology.pp_group, group_src=stage)
    return list(shards.unbind()) if topology.pp_rank == 0 and shards is not None else None


@torch.no_grad()
def _flatten(parameters: Mapping[str, torch.Tensor], bucket: Sequence[Piece], topology: Topology) -> torch.Tensor:
    """This rank's parts of the bucket's tensors, each flattened, in order; padding entries hold 0."""
    parts = []
    for piece in bucket:
        row, parameter = piece.row, parameters[piece.row.parameter]
        own = [part for part in row.slices(topology.tp_size, topology.tp_rank) if part.source == piece.source]
        taken = [parameter.narrow(row.dim, part.start, part.length) for part in own]
        padding = row.shard_length(piece.source, topology.tp_size) - sum(part.length for part in own)
        if padding:
            taken.append(parameter.narrow(row.dim, parameter.shape[row.dim] - padding, padding))
        parts.extend(part.reshape(-1) for part in ([torch.cat(taken, row.dim)] if row.dim else taken))
    return torch.cat(parts)


def _assemble(bucket: Sequence[Piece], shards: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Full tensors from the flat parts of all TP ranks, padding cut off; each owns its memory."""
    tp, start = len(shards), 0
    for piece in bucket:
        shape = piece.shard_shape(tp)
        size = torch.Size(shape).numel()
        used = shards[:1] if piece.row.split is None else shards
        full = torch.cat([shard[start : start + size].view(shape) for shard in used], piece.row.dim)
        length = piece.shape[piece.row.dim]
        yield full if full.shape[piece.row.dim] == length else full.narrow(piece.row.dim, 0, length).clone()
        start += size
