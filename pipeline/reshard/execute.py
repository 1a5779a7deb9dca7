"""Carries out a :class:`Plan` with point-to-point messages.

For every bucket: copies within the process, then stage 1, then stage 2. In a stage each pair of processes exchanges one
message, a flat buffer of all pieces of the bucket; buffers live for one stage, so the plan's bound holds for what is in
flight. Behind its pieces a message has the sender's digest of each. The receiver compares them with the digests of what
it has written, read back from where it wrote it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from pipeline.model.fp8 import CODES, quantise
from pipeline.model.fp8_layout import BLOCK, scale_name
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, Slice
from pipeline.reshard import digest
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
        self._parameters = parameters
        self._cuts: dict[str, list[tuple[Row, Slice]]] = {}
        for row in rows:
            for cut in row.slices(*part) if (part := row.part(learner, rank)) else ():
                self._cuts.setdefault(row.sources[cut.source].name, []).append((row, cut))

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """See :class:`Reader`."""
        found = []
        for row, cut in self._cuts[tensor.name]:
            begin, end = max(start, cut.source_start), min(start + length, cut.source_start + cut.length)
            if begin < end:
                at = cut.start + begin - cut.source_start
                found.append(self._parameters[row.parameter].narrow(row.dim, at, end - begin))
        return found

    def held(self, name: str) -> tuple[int, list[torch.Tensor]]:
        """Where the rank's part of a Hugging Face tensor begins, and its consecutive views."""
        cuts = self._cuts[name]
        views = [self._parameters[row.parameter].narrow(row.dim, cut.start, cut.length) for row, cut in cuts]
        return cuts[0][1].source_start, views


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


class Exchange(Protocol):
    """What carries the messages of one stage, e.g. ``link.Link``."""

    def exchange(self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Send and receive flat buffers, each with the process at its other end; return when all have arrived."""
        ...


class DigestError(RuntimeError):
    """What was written differs from what was sent; the message names the tensor."""


@dataclass
class Moved:
    """What one process did; bytes of weights."""

    copied: int = 0  # within the process
    sent: int = 0
    received: int = 0
    peak_buffer: int = 0  # send and receive buffers held at once, without digests


@dataclass(frozen=True)
class Mover:
    """One process's share of a plan, ready to be carried out any number of times: its messages are laid out once."""

    plan: Plan
    stages: tuple[_Stage, ...]
    device: torch.device

    @classmethod
    def of(cls, plan: Plan, process: int, device: torch.device | str = "cpu") -> Mover:
        """For a process, with buffers on its ``device``."""
        tasks = plan.tasks(process)
        runs = _runs(2 * tasks.bucket + (tasks.kind == FANOUT))
        stages = (_stage(plan, tasks, process, np.arange(first, last)) for first, last in runs)
        return cls(plan, tuple(stages), torch.device(device))

    def move(self, learner: Reader, engine: EngineShards, link: Exchange) -> Moved:
        """Move the weights of this process's share. Every process of the plan does the same.

        ``learner``: what the process holds; ``engine``: where what it needs belongs. A process without a rank on one
        side passes ``EngineShards({})`` there. Weights of another type are converted as they are packed and as they are
        written. Returns once this process has sent and received all of its own. Raises :class:`DigestError`, and what
        ``link`` raises.
        """
        moved = Moved()
        for stage in self.stages:
            for piece in stage.local:
                target = engine.read(piece.tensor, piece.start, piece.length)[0]
                _copy(learner.read(piece.tensor, piece.start, piece.length), target, piece.tensor.dim)
            moved.copied += sum(piece.nbytes for piece in stage.local)
            self._exchange(stage, engine if stage.fanout else learner, engine, link, moved)
        return moved

    def _exchange(self, stage: _Stage, reader: Reader, engine: EngineShards, link: Exchange, moved: Moved) -> None:
        """What crosses processes in one stage of one bucket."""
        sends, receives = ([_Message(each, self.device) for each in side] for side in (stage.sends, stage.receives))
        for message in sends:
            for piece, view in message.pieces():
                _copy(reader.read(piece.tensor, piece.start, piece.length), view, piece.tensor.dim)
            message.digests.copy_(torch.stack([digest.content(view) for _, view in message.pieces()]))
        link.exchange(*([(message.layout.peer, message.buffer) for message in side] for side in (sends, receives)))
        for message in receives:
            _write(message, engine)
        sent, received = (sum(each.nbytes for each in side) for side in (stage.sends, stage.receives))
        moved.sent += sent
        moved.received += received
        moved.peak_buffer = max(moved.peak_buffer, sent + received)


@dataclass(frozen=True)
class _Piece:
    """Entries of one tensor."""

    tensor: Tensor
    start: int
    length: int
    nbytes: int

    @property
    def shape(self) -> list[int]:
        return [self.length if dim == self.tensor.dim else size for dim, size in enumerate(self.tensor.shape)]


@dataclass(frozen=True)
class _Layout:
    """All that one process sends to another in one stage of one bucket."""

    peer: int
    pieces: tuple[_Piece, ...]
    nbytes: int  # of the pieces


@dataclass(frozen=True)
class _Stage:
    """One process's part in one stage of one bucket."""

    fanout: bool  # the second stage: what is sent was received in the first
    local: tuple[_Piece, ...]  # copied within the process
    sends: tuple[_Layout, ...]
    receives: tuple[_Layout, ...]


class _Message:
    """A message under way: a flat buffer of its pieces, then their digests."""

    def __init__(self, layout: _Layout, device: torch.device) -> None:
        self.layout = layout
        padded = -(-layout.nbytes // 8) * 8
        self.buffer = torch.empty(padded + 8 * len(layout.pieces), dtype=torch.uint8, device=device)
        self.digests = self.buffer[padded:].view(torch.int64)
        parts = self.buffer[: layout.nbytes].split([piece.nbytes for piece in layout.pieces])
        self._views = [
            part.view(DTYPES[piece.tensor.item_size]).view(piece.shape)
            for piece, part in zip(layout.pieces, parts, strict=True)
        ]

    def pieces(self) -> Iterator[tuple[_Piece, torch.Tensor]]:
        """Each with its view of the buffer."""
        return zip(self.layout.pieces, self._views, strict=True)


def _stage(plan: Plan, tasks: Tasks, process: int, run: np.ndarray) -> _Stage:
    local = tasks.kind[run] == LOCAL
    fanout = bool((tasks.kind[run] == FANOUT).any())
    near, far = run[local], run[~local]
    return _Stage(
        fanout,
        tuple(_pieces(plan, tasks, near)),
        tuple(_layouts(plan, tasks, far[tasks.source[far] == process], tasks.destination)),
        tuple(_layouts(plan, tasks, far[tasks.destination[far] == process], tasks.source)),
    )


def _pieces(plan: Plan, tasks: Tasks, members: np.ndarray) -> Iterator[_Piece]:
    columns = (column[members].tolist() for column in (tasks.tensor, tasks.start, tasks.length, tasks.bytes))
    return (
        _Piece(plan.tensors[index], start, length, size) for index, start, length, size in zip(*columns, strict=True)
    )


def _layouts(plan: Plan, tasks: Tasks, run: np.ndarray, peers: np.ndarray) -> Iterator[_Layout]:
    """``run`` by peer.

    Wider numbers come first, so that every view is aligned; both sides put them in the same order.
    """
    widths = np.array([plan.tensors[index].item_size for index in tasks.tensor[run]], dtype=np.int64)
    run = run[np.lexsort((tasks.start[run], tasks.tensor[run], -widths, peers[run]))]
    for first, last in _runs(peers[run]):
        members = run[first:last]
        yield _Layout(int(peers[members[0]]), tuple(_pieces(plan, tasks, members)), int(tasks.bytes[members].sum()))


def _write(message: _Message, engine: EngineShards) -> None:
    """Write what came to where it belongs, and compare its digests."""
    found = []
    for piece, view in message.pieces():
        target = engine.read(piece.tensor, piece.start, piece.length)[0]
        target.copy_(view)
        found.append(digest.content(target.to(view.dtype)).to(view.device))
    differs = torch.stack(found) != message.digests
    if differs.any():
        pieces = message.layout.pieces
        names = [piece.tensor.name for piece, wrong in zip(pieces, differs.tolist(), strict=True) if wrong]
        raise DigestError(
            f"{len(names)} tensors differ from what process {message.layout.peer} sent, first {names[0]!r}: either a "
            "byte was lost on the way or the engine's parameters cannot hold the type that was sent"
        )


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
