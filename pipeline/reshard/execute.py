"""Carries out a ``Plan`` with point-to-point messages.

For every bucket: what a process both holds and needs, then stage 1, then stage 2. In a stage each pair of processes
exchanges one message of all pieces of the bucket; buffers live for one stage, so the plan's bound holds for what is in
flight. Where engines share the learner's GPUs, a learner rank does the share of the engine rank on its GPU, and hands
over what arrives (``handover``).
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
from pipeline.reshard.messages import DTYPES, Buffer, Layout, Message, Piece, Reader
from pipeline.reshard.pieces import FANOUT, LOCAL
from pipeline.reshard.plan import Plan, Tasks, Tensor


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
        for cuts in self._cuts.values():  # the parameter interleaves what the tensor has end to end
            cuts.sort(key=lambda held: held[1].source_start)

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """See ``Reader``."""
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
    """``LearnerShards`` that serves FP8 codes and scales of the tensors that are quantised before sending.

    Quantised when first read; the ``keep_bytes`` read last are kept, as a bucket sends a tensor to several ranks.
    """

    def __init__(self, shards: LearnerShards, keep_bytes: int = 512 << 20) -> None:
        self._shards, self._keep = shards, keep_bytes
        self._done: OrderedDict[str, tuple[int, torch.Tensor, torch.Tensor]] = OrderedDict()

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """See ``Reader``."""
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
        self._buffer: Buffer | None = None

    @classmethod
    def empty(cls, plan: Plan, process: int, device: torch.device | str = "cpu") -> EngineShards:
        """New uninitialised tensors for what ``process`` needs."""
        shards = {}
        for index, span in plan.needs(process).items():
            tensor = plan.tensors[index]
            shape, dtype = tensor.part_shape(len(span)), DTYPES[tensor.item_size]
            shards[tensor.name] = span.start, torch.empty(shape, dtype=dtype, device=device)
        return cls(shards)

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """See ``Reader``."""
        first, shard = self.shards[tensor.name]
        return [shard.narrow(tensor.dim, start - first, length)]

    def room(self, layouts: Sequence[Layout], device: torch.device, *, fresh: bool) -> list[Message]:
        """See ``Engine``. What came before has been written."""
        self._buffer = self._buffer or Buffer(device)
        return self._buffer.messages(layouts)

    def arrived(self, messages: Sequence[Message]) -> None:
        """Write them in place, and compare their digests."""
        for message in messages:
            message.write(self)


class Engine(Reader, Protocol):
    """What becomes of the messages for an engine rank: ``EngineShards``, or ``handover.Handover``."""

    def room(self, layouts: Sequence[Layout], device: torch.device, *, fresh: bool) -> list[Message]:
        """Messages to be filled, on ``device``. ``fresh``: nobody reads what came before any more."""
        ...

    def arrived(self, messages: Sequence[Message]) -> None:
        """They are filled. Raises ``DigestError``."""
        ...


class Exchange(Protocol):
    """What carries the messages of one stage, e.g. ``link.Link``."""

    def exchange(self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Send and receive flat buffers, each with the process at its other end; return when all have arrived."""
        ...


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
    stages: tuple[Stage, ...]
    device: torch.device

    @classmethod
    def of(cls, plan: Plan, process: int, device: torch.device | str = "cpu") -> Mover:
        """For a process, with buffers on its ``device``."""
        tasks = plan.tasks(process)
        runs = [np.arange(first, last) for first, last in _runs(2 * tasks.bucket + (tasks.kind == FANOUT))]
        buckets = [int(tasks.bucket[run[0]]) for run in runs]
        fresh = [number == 0 or buckets[number - 1] != bucket for number, bucket in enumerate(buckets)]
        stages = (_stage(plan, tasks, process, run, first) for run, first in zip(runs, fresh, strict=True))
        return cls(plan, tuple(stages), torch.device(device))

    def move(self, learner: Reader, engine: Engine, link: Exchange) -> Moved:
        """Move the weights of this process's share. Every process of the plan does the same.

        ``learner``: what the process holds; ``engine``: where what it needs belongs. A process without a rank on one
        side passes ``EngineShards({})`` there. Weights of another type are converted as they are packed and as they are
        written. Returns once this process has sent and received all of its own. Raises ``DigestError``, and what
        ``link`` raises.
        """
        moved = Moved()
        buffer = Buffer(self.device)
        for stage in self.stages:
            for layout in stage.own:
                own = engine.room([layout], self.device, fresh=True)
                own[0].pack(learner)
                engine.arrived(own)
                moved.copied += layout.nbytes
            sends = buffer.messages(stage.sends)
            for message in sends:
                message.pack(engine if stage.fanout else learner)
            self._exchange(stage, sends, engine, link, moved)
        return moved

    def _exchange(self, stage: Stage, sends: Sequence[Message], engine: Engine, link: Exchange, moved: Moved) -> None:
        """What crosses processes in one stage of one bucket."""
        receives = engine.room(stage.receives, self.device, fresh=stage.fresh)
        link.exchange(*([(message.layout.peer, message.buffer) for message in side] for side in (sends, receives)))
        engine.arrived(receives)
        sent, received = (sum(each.nbytes for each in side) for side in (stage.sends, stage.receives))
        moved.sent += sent
        moved.received += received
        moved.peak_buffer = max(moved.peak_buffer, sent + received)


@dataclass(frozen=True)
class Stage:
    """One process's part in one stage of one bucket."""

    fresh: bool  # its bucket's first
    fanout: bool  # the second stage: what is sent was received in the first
    own: tuple[Layout, ...]  # what the process both holds and needs, a bucket's bytes at a time
    sends: tuple[Layout, ...]
    receives: tuple[Layout, ...]


def _stage(plan: Plan, tasks: Tasks, process: int, run: np.ndarray, fresh: bool) -> Stage:
    local = tasks.kind[run] == LOCAL
    fanout = bool((tasks.kind[run] == FANOUT).any())
    near, far = run[local], run[~local]
    own = (part for layout in _layouts(plan, tasks, near, tasks.source) for part in _parts(layout, plan.bucket_bytes))
    return Stage(
        fresh,
        fanout,
        tuple(own),
        tuple(_layouts(plan, tasks, far[tasks.source[far] == process], tasks.destination)),
        tuple(_layouts(plan, tasks, far[tasks.destination[far] == process], tasks.source)),
    )


def _parts(layout: Layout, most: int) -> Iterator[Layout]:
    """``layout`` as several of at most ``most`` bytes, or of one entry each where an entry is larger."""
    pieces: list[Piece] = []
    size = 0
    for piece in (part for whole in layout.pieces for part in whole.cut(most)):
        if pieces and size + piece.nbytes > most:
            yield Layout(layout.peer, tuple(pieces))
            pieces, size = [], 0
        pieces.append(piece)
        size += piece.nbytes
    yield Layout(layout.peer, tuple(pieces))


def _layouts(plan: Plan, tasks: Tasks, run: np.ndarray, peers: np.ndarray) -> Iterator[Layout]:
    """``run`` by peer. Both sides put the pieces in the same order."""
    widths = np.array([plan.tensors[index].item_size for index in tasks.tensor[run]], dtype=np.int64)
    run = run[np.lexsort((tasks.start[run], tasks.tensor[run], -widths, peers[run]))]
    for first, last in _runs(peers[run]):
        members = run[first:last]
        columns = (column[members].tolist() for column in (tasks.tensor, tasks.start, tasks.length, tasks.bytes))
        pieces = (Piece(plan.tensors[index], *rest) for index, *rest in zip(*columns, strict=True))
        yield Layout(int(peers[members[0]]), tuple(pieces))


def _runs(column: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index (exclusive) of every run of equal neighbours."""
    edges = np.flatnonzero(np.diff(column)) + 1
    yield from pairwise([0, *edges.tolist(), len(column)] if len(column) else [])
