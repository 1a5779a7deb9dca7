"""Carries out a :class:`Plan` with point-to-point messages of torch.distributed (gloo or NCCL).

For every bucket: copies within the process, then stage 1, then stage 2. In a stage each pair of processes exchanges one
message, a flat buffer of all pieces of the bucket; buffers live for one stage, so the plan's bound holds for what is in
flight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from pipeline.model.fp8 import CODES, quantise
from pipeline.model.fp8_layout import BLOCK, scale_name
from pipeline.model.grid import Grid
from pipeline.model.layout import Row
from pipeline.reshard.pieces import FANOUT, LOCAL
from pipeline.reshard.plan import Plan, Tasks, Tensor

DTYPES = {1: CODES, 2: torch.bfloat16, 4: torch.float32}  # by item size


class Reader(Protocol):
    """Where a process takes the bytes that it sends first."""

    def read(self, tensor: Tensor, start: int, length: int) -> Sequence[torch.Tensor]:
        """Entries ``start ..

        start + length`` along ``tensor.dim``, as consecutive views along it. Only for what the plan says it holds.
        """
        ...


class LearnerShards:
    """What a learner rank holds, read from its Megatron parameters through the layout table; nothing is copied.

    ``parameters``: local shards by the layout's names. Raises ``KeyError`` on a tensor that the rank does not hold.
    """

    def __init__(self, rows: Sequence[Row], learner: Grid, rank: int, parameters: Mapping[str, torch.Tensor]) -> None:
        self._pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for row in rows:
            part = row.part(learner, rank)
            if part is None:
                continue
            for cut in row.slices(*part):
                view = parameters[row.parameter].narrow(row.dim, cut.start, cut.length)
                self._pieces.setdefault(row.sources[cut.source].name, []).append((cut.source_start, view))

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """See :class:`Reader`."""
        found = []
        for first, view in self._pieces[tensor.name]:
            begin, end = max(start, first), min(start + length, first + view.shape[tensor.dim])
            if begin < end:
                found.append(view.narrow(tensor.dim, begin - first, end - begin))
        return found

    def held(self, name: str) -> tuple[int, list[torch.Tensor]]:
        """Where the rank's part of a Hugging Face tensor begins, and its consecutive views."""
        pieces = self._pieces[name]
        return pieces[0][0], [view for _, view in pieces]


class QuantisedShards:
    """:class:`LearnerShards` that serves FP8 codes and scales of the tensors that are quantised before sending.

    Quantised when first read; the ``keep_bytes`` read last are kept, as a bucket sends a tensor to several ranks.
    """

    def __init__(self, shards: LearnerShards, keep_bytes: int = 512 << 20) -> None:
        self._shards, self._keep = shards, keep_bytes
        self._done: OrderedDict[str, tuple[int, torch.Tensor, torch.Tensor]] = OrderedDict()

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """See :class:`Reader`."""
        if tensor.quantise != "before":
            return self._shards.read(tensor, start, length)
        scales = tensor.item_size != CODES.itemsize
        first, codes, scale = self._quantised(
            tensor.name.removesuffix(scale_name("")) if scales else tensor.name, tensor.dim
        )
        if scales:
            return [scale.narrow(tensor.dim, start - first // BLOCK[tensor.dim], length)]
        return [codes.narrow(tensor.dim, start - first, length)]

    def _quantised(self, name: str, dim: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        if name not in self._done:
            first, views = self._shards.held(name)
            self._done[name] = first, *quantise(torch.cat(views, dim))
        self._done.move_to_end(name)
        while len(self._done) > 1 and sum(codes.numel() for _, codes, _ in self._done.values()) > self._keep:
            self._done.popitem(last=False)
        return self._done[name]


class EngineShards:
    """What an engine rank receives.

    By tensor name: where its entries begin along the tensor's dimension, and where they belong.
    """

    def __init__(self, shards: Mapping[str, tuple[int, torch.Tensor]]) -> None:
        self.shards = shards

    @classmethod
    def empty(cls, plan: Plan, process: int, device: torch.device | str = "cpu") -> EngineShards:
        """New uninitialised tensors for what ``process`` needs."""
        shards = {}
        for index, span in plan.needs(process).items():
            tensor = plan.tensors[index]
            shape = [len(span) if dim == tensor.dim else size for dim, size in enumerate(tensor.shape)]
            shards[tensor.name] = span.start, torch.empty(shape, dtype=DTYPES[tensor.item_size], device=device)
        return cls(shards)

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """See :class:`Reader`."""
        first, shard = self.shards[tensor.name]
        return [shard.narrow(tensor.dim, start - first, length)]


@dataclass
class Moved:
    """What one process did; bytes."""

    copied: int = 0  # within the process
    sent: int = 0
    received: int = 0
    peak_buffer: int = 0  # send and receive buffers held at once


def execute(
    plan: Plan,
    tasks: Tasks,
    process: int,
    learner: Reader,
    engine: EngineShards,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> Moved:
    """Move the weights of this process's share of ``plan``.

    Every process of ``group`` calls it, numbered as in the plan.

    ``tasks``: ``plan.tasks(process)``, the same for every sync. ``learner``: what the process holds; ``engine``: where
    what it needs belongs. A process without a rank on one side passes ``EngineShards({})`` there. Weights of another
    type are converted as they are packed. Returns once this process has sent and received all of its own.
    """
    moved = Moved()
    dist.barrier(group)  # NCCL sets its communicators up in the first call that all processes make
    stages = 2 * tasks.bucket + (tasks.kind == FANOUT)
    for first, last in _runs(stages):
        run = np.arange(first, last)
        local = run[tasks.kind[run] == LOCAL]
        for task in local:
            tensor, start, length = _interval(plan, tasks, task)
            _copy(learner.read(tensor, start, length), engine.read(tensor, start, length)[0], tensor.dim)
        moved.copied += int(tasks.bytes[local].sum())
        reader = engine if tasks.kind[first] == FANOUT else learner
        _exchange(plan, tasks, run[tasks.kind[run] != LOCAL], process, reader, engine, device, group, moved)
    return moved


def _exchange(
    plan: Plan,
    tasks: Tasks,
    run: np.ndarray,
    process: int,
    reader: Reader,
    engine: EngineShards,
    device: torch.device | str,
    group: dist.ProcessGroup | None,
    moved: Moved,
) -> None:
    """One stage of one bucket."""
    sends = list(_messages(plan, tasks, run[tasks.source[run] == process], tasks.destination, device))
    receives = list(_messages(plan, tasks, run[tasks.destination[run] == process], tasks.source, device))
    for message in sends:
        for tensor, start, length, view in message.pieces:
            _copy(reader.read(tensor, start, length), view, tensor.dim)
    operations = [dist.P2POp(dist.irecv, message.buffer, message.peer, group) for message in receives]
    operations += [dist.P2POp(dist.isend, message.buffer, message.peer, group) for message in sends]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for message in receives:
        for tensor, start, length, view in message.pieces:
            engine.read(tensor, start, length)[0].copy_(view)
    sent, received = (sum(message.buffer.numel() for message in side) for side in (sends, receives))
    moved.sent += sent
    moved.received += received
    moved.peak_buffer = max(moved.peak_buffer, sent + received)


@dataclass(frozen=True)
class _Message:
    """All that one process sends to another in one stage of one bucket."""

    peer: int
    buffer: torch.Tensor  # bytes
    pieces: list[tuple[Tensor, int, int, torch.Tensor]]  # tensor, start, length, view of the buffer


def _messages(
    plan: Plan, tasks: Tasks, run: np.ndarray, peers: np.ndarray, device: torch.device | str
) -> Iterator[_Message]:
    """``run`` by peer.

    Wider numbers come first, so that every view is aligned; both sides put them in the same order.
    """
    widths = np.array([plan.tensors[index].item_size for index in tasks.tensor[run]], dtype=np.int64)
    run = run[np.lexsort((tasks.start[run], tasks.tensor[run], -widths, peers[run]))]
    for first, last in _runs(peers[run]):
        members = run[first:last]
        buffer = torch.empty(int(tasks.bytes[members].sum()), dtype=torch.uint8, device=device)
        pieces = []
        for task, data in zip(members, buffer.split(tasks.bytes[members].tolist()), strict=True):
            tensor, start, length = _interval(plan, tasks, task)
            shape = [length if dim == tensor.dim else size for dim, size in enumerate(tensor.shape)]
            pieces.append((tensor, start, length, data.view(DTYPES[tensor.item_size]).view(shape)))
        yield _Message(int(peers[members[0]]), buffer, pieces)


def _interval(plan: Plan, tasks: Tasks, task: int) -> tuple[Tensor, int, int]:
    return plan.tensors[tasks.tensor[task]], int(tasks.start[task]), int(tasks.length[task])


def _copy(parts: Sequence[torch.Tensor], target: torch.Tensor, dim: int) -> None:
    """Consecutive parts into one tensor."""
    at = 0
    for part in parts:
        target.narrow(dim, at, part.shape[dim]).copy_(part)
        at += part.shape[dim]


def _runs(column: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index (exclusive) of every run of equal neighbours."""
    edges = np.flatnonzero(np.diff(column)) + 1
    yield from pairwise([0, *edges.tolist(), len(column)] if len(column) else [])
