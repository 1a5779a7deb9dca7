"""Plans which bytes go from which Megatron rank to which SGLang rank, and in what order.

Pure data, no collectives, deterministic.

Every Hugging Face tensor is divided along one dimension on both sides, so what a rank holds or needs of it is an
interval. Who holds what follows from the layout table (``Row.slices`` on ``Grid``), who needs what from
``EngineGrid``; ``pieces`` says how the difference travels. The plan is minimal: no byte reaches a rank that
holds it or does not need it, no byte reaches a rank twice, and one copy of a byte enters a node at most, only where
nobody on the node holds it. Megatron-core's own resharding (``megatron/core/resharding``, 0.19) plans per rank alike,
but from Megatron to Megatron and without nodes.

Replicas share the sending. For every segment that no rank of a node holds, all its holders send equal shares; within a
node all holders of a segment there; and the ranks of a node that need a segment take in equal shares of the one copy.
Equal means: to one entry per segment, tensor and bucket (within a node: and receiver), where shares are at least
``SMALLEST_SHARE`` bytes. Smaller tensors (norms, biases) are dealt in turn. Where one rank only may serve a receiver
there is nothing to balance.

Work is done in buckets: what a process receives and sends in one stage of one bucket fits ``bucket_bytes``. A tensor
that would not fit is divided, every segment alike. In stage 1 bytes enter nodes or are copied from holders within a
node, in stage 2 the ranks of a node pass on what they took in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import numpy as np

from pipeline.model.architecture import Architecture
from pipeline.model.fp8_layout import BLOCK, quantised, scale_name, scale_shape
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, rows
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.pieces import FANOUT, LOCAL, Interval, Pieces, Segment, pieces, segments

SMALLEST_SHARE = 1 << 16  # bytes
# Bytes of an entry as it is sent; in FP8, of the tensors that are not quantised before, which stay as the learner has
# them: "fp8" in bf16, "fp8 fp32" in float32.
ITEM_SIZES = {"bf16": 2, "fp32": 4, "fp8": 2, "fp8 fp32": 4}


class BucketError(ValueError):
    """A bucket too small for single rows."""


@dataclass(frozen=True)
class Tensor:
    """One tensor that travels: a Hugging Face tensor or, in FP8, its codes or their scales."""

    name: str
    shape: tuple[int, ...]
    dim: int  # along which intervals run
    item_size: int  # bytes
    quantise: str | None = None  # "before" sending, "after", or not at all

    @property
    def length(self) -> int:
        """Entries along ``dim``."""
        return self.shape[self.dim]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry along ``dim``."""
        return prod(self.shape) // self.length * self.item_size

    def part_shape(self, length: int) -> list[int]:
        """Shape of ``length`` entries along ``dim``."""
        return [*self.shape[: self.dim], length, *self.shape[self.dim + 1 :]]


@dataclass(frozen=True)
class Tasks:
    """Transfers as columns of equal length, ordered by bucket, stage, source, destination, tensor and start."""

    tensor: np.ndarray  # index in ``Plan.tensors``
    start: np.ndarray  # first entry along the tensor's dimension
    length: np.ndarray
    source: np.ndarray  # process; of FANOUT an engine's, which received these bytes in stage 1
    destination: np.ndarray  # process
    bytes: np.ndarray
    kind: np.ndarray  # LOCAL, NEAR, INTER (stage 1), FANOUT (stage 2)
    bucket: np.ndarray

    def __len__(self) -> int:
        return len(self.tensor)


@dataclass(frozen=True)
class Block:
    """Tensors that travel alike."""

    tensors: np.ndarray  # indices in ``Plan.tensors``
    turns: np.ndarray  # how far the choice of replicas has turned, by tensor
    entry_bytes: int
    pieces: Pieces
    chunks: int
    buckets: np.ndarray  # [tensors, chunks]


@dataclass(frozen=True, eq=False)
class Plan:
    """See the module's text. Ranks are processes of ``placement``. A plan is equal to itself only."""

    model: Architecture
    learner: Grid
    engines: EngineGrid
    placement: Placement
    bucket_bytes: int
    tensors: tuple[Tensor, ...]
    blocks: tuple[Block, ...]
    buckets: int
    bounds: Bounds

    def tasks(self, process: int | None = None) -> Tasks:
        """Every transfer, or those in which ``process`` sends or receives."""
        parts: list[list[np.ndarray]] = []
        for block in self.blocks:
            source, destination = block.pieces.sources(block.turns), block.pieces.destinations(block.turns)
            mine = np.ones_like(source, bool) if process is None else (source == process) | (destination == process)
            tensor, piece = np.nonzero(mine)
            length = block.pieces.length[piece]
            parts.append(
                [
                    block.tensors[tensor],
                    block.pieces.start[piece],
                    length,
                    source[mine],
                    destination[mine],
                    length * block.entry_bytes,
                    block.pieces.kind[piece],
                    block.buckets[tensor, block.pieces.chunk[piece]],
                ]
            )
        tensor, start, length, source, destination, size, kind, bucket = map(np.concatenate, zip(*parts, strict=True))
        order = np.lexsort((start, tensor, destination, source, kind == FANOUT, bucket))
        columns = (tensor, start, length, source, destination, size, kind, bucket)
        return Tasks(*(column[order] for column in columns))

    def needs(self, process: int) -> Mapping[int, range]:
        """What a process must end up with: entries by index in ``tensors``."""
        return _needs(self, process)

    def traffic(self) -> np.ndarray:
        """Bytes by kind, direction (0 sent, 1 received), bucket and process."""
        counts = np.zeros((4, 2, self.buckets, self.placement.world_size), dtype=np.int64)
        for block in self.blocks:
            columns = block.pieces
            buckets = block.buckets[:, columns.chunk]
            for direction, processes in enumerate((columns.sources(block.turns), columns.destinations(block.turns))):
                index = np.ravel_multi_index((columns.kind[None, :], direction, buckets, processes), counts.shape)
                size = np.broadcast_to(columns.length * block.entry_bytes, index.shape)
                np.add.at(counts.reshape(-1), index.ravel(), size.ravel())
        return counts


@lru_cache(maxsize=8)  # asked for in every update
def _needs(plan: Plan, process: int) -> Mapping[int, range]:
    tasks = plan.tasks(process)
    mine = tasks.destination == process
    first = np.full(len(plan.tensors), np.iinfo(np.int64).max)
    last = np.zeros(len(plan.tensors), dtype=np.int64)
    np.minimum.at(first, tasks.tensor[mine], tasks.start[mine])
    np.maximum.at(last, tasks.tensor[mine], (tasks.start + tasks.length)[mine])
    return {index: range(int(first[index]), int(last[index])) for index in np.flatnonzero(last).tolist()}


@dataclass(frozen=True)
class Bounds:
    """What no plan can beat, counted from intervals alone; bytes by process or by node."""

    need: np.ndarray  # by process: bytes that its engine rank must end up with
    ingress: np.ndarray  # by process: of these, those that it does not hold itself
    node_ingress: np.ndarray  # by node: distinct bytes that somebody there needs and nobody there holds
    full_ingress: np.ndarray  # by process: what an engine rank receives that accepts whole tensors only
    full_node_ingress: np.ndarray  # by node: the same, one copy of each byte
    full: int  # bytes of all tensors


def make_plan(
    model: Architecture,
    learner: Grid,
    engines: EngineGrid,
    placement: Placement,
    bucket_bytes: int = 512 << 20,
    dtype: str = "bf16",
    smallest_share: int = SMALLEST_SHARE,
) -> Plan:
    """The plan that moves ``model`` from ``learner`` to ``engines``. ``dtype``: a key of ``ITEM_SIZES``.

    Raises ``ValueError`` where a side cannot be divided so, ``BucketError`` where a bucket is too small.
    """
    engines.check(model)
    if (placement.learners, placement.engines) != (learner.world_size, engines.world_size):
        raise ValueError(
            f"the placement is for {placement.learners} learner and {placement.engines} engine ranks, "
            f"the layouts have {learner.world_size} and {engines.world_size}"
        )
    tensors, kinds = _tensors(model, learner, engines, placement, dtype)
    nodes = np.array(placement.nodes)
    drafts = [_draft(kind, turn, nodes, bucket_bytes, smallest_share) for turn, kind in enumerate(kinds)]
    buckets, count = _buckets(drafts, len(tensors), bucket_bytes)
    bounds = _Bounds(placement)
    blocks = []
    for draft, bucket in zip(drafts, buckets, strict=True):
        bounds.add(draft.parts, draft.kind.entry_bytes, len(draft.turns))
        members = np.array(draft.kind.members)
        blocks.append(Block(members, draft.turns, draft.kind.entry_bytes, draft.pieces, draft.chunks, bucket))
    return Plan(model, learner, engines, placement, bucket_bytes, tensors, tuple(blocks), count, bounds.finish())


@dataclass
class _Kind:
    """Tensors that travel alike: of equal size, with equal holders and needers."""

    length: int
    entry_bytes: int
    item_size: int
    held: list[Interval]
    needed: list[Interval]
    quantise: str | None = None
    scales: bool = False
    members: list[int] = field(default_factory=list)

    def tensor(self, name: str, shape: tuple[int, ...], dim: int) -> Tensor:
        """One of them, that belongs to this Hugging Face tensor."""
        if self.scales:
            name, shape = scale_name(name), scale_shape(shape)
        return Tensor(name, shape, dim, self.item_size, self.quantise)


def _tensors(
    model: Architecture, learner: Grid, engines: EngineGrid, placement: Placement, dtype: str
) -> tuple[tuple[Tensor, ...], list[_Kind]]:
    """Every tensor in the order in which it is sent, and the kinds they fall into."""
    everything = rows(model, learner)
    copies = {row.sources[0].name: row.stage for row in everything if not row.exported}
    experts = model.moe.experts if model.moe else 0
    tensors: list[Tensor] = []
    kinds: dict[tuple, list[_Kind]] = {}
    for row, index in _interleaved([row for row in everything if row.exported], learner, engines, model):
        source = row.sources[index]
        stages = tuple(sorted({row.stage, copies.get(source.name, row.stage)}))
        groups = None
        if row.expert is not None:
            groups = row.ep, engines.expert_group(row.expert, experts)
        fp8 = dtype.startswith("fp8") and quantised(row)
        whose = index if row.groups else 0  # elsewhere all sources of a row are divided alike
        item_size = 4 if row.float32 else ITEM_SIZES[dtype]
        key = (
            source.shape,
            source.stacked,
            row.split,
            row.groups,
            whose,
            row.layer is None,
            stages,
            groups,
            fp8,
            item_size,
        )
        if key not in kinds:
            held = _held(row, index, learner, stages)
            needed = _needed(row, index, engines, experts, placement)
            kinds[key] = _kinds(row, index, held, needed, item_size, fp8)
        for kind in kinds[key]:
            kind.members.append(len(tensors))
            tensors.append(kind.tensor(source.name, source.shape, row.dim))
    return tuple(tensors), [kind for found in kinds.values() for kind in found]


def _kinds(
    row: Row, index: int, held: list[Interval], needed: list[Interval], item_size: int, fp8: bool
) -> list[_Kind]:
    """What a source travels as: itself or, where every holder has whole blocks, FP8 codes and their scales."""
    shape = row.sources[index].shape
    length, width = shape[row.dim], prod(shape) // shape[row.dim]
    plain = _Kind(length, width * item_size, item_size, held, needed)
    if not fp8:
        return [plain]
    if not _aligned(needed, length, BLOCK[row.dim]):
        raise ValueError(
            f"FP8: the engines would cut {row.sources[index].name} {list(shape)} within {BLOCK[0]} x {BLOCK[1]} "
            "blocks, which SGLang refuses: lower the engines' tp, or raise their ep"
        )
    if not _aligned(held, length, BLOCK[row.dim]):
        plain.quantise = "after"
        return [plain]
    codes = _Kind(length, width, 1, held, needed, "before")
    block = BLOCK[row.dim]
    blocks = [
        [(process, start // block, -(-stop // block)) for process, start, stop in side] for side in (held, needed)
    ]
    count = scale_shape(shape)[row.dim]
    scales = _Kind(count, 4 * prod(scale_shape(shape)) // count, 4, blocks[0], blocks[1], "before", scales=True)
    return [codes, scales]


def _aligned(intervals: Sequence[Interval], length: int, block: int) -> bool:
    return all(start % block == 0 and (stop % block == 0 or stop == length) for _, start, stop in intervals)


def _interleaved(
    exported: Sequence[Row], learner: Grid, engines: EngineGrid, model: Architecture
) -> Iterator[tuple[Row, int]]:
    """Rows and indices of their sources, in an order that spreads the load.

    Neighbours have different holders, and experts different needers.

    All can then send and receive at the same time.
    """
    order = [[layer for chunk in chunks for layer in chunk] for chunks in learner.chunks(model.layers)]
    depth = {layer: number for layers in order for number, layer in enumerate(layers)}  # within the stage
    seen: Counter[tuple[int, int | None]] = Counter()
    keys = []
    for number, row in enumerate(exported):
        line = seen[row.stage, row.expert]  # which of the stage's, or of this expert's, rows
        seen[row.stage, row.expert] += 1
        at = depth[row.layer] if row.layer is not None else -1 if line == 0 else model.layers
        first: tuple[int, ...] = (line,)
        last: tuple[int | None, ...] = ()
        if row.expert is not None and model.moe is not None:
            share = model.moe.experts // engines.ep
            local = row.expert % (model.moe.experts // learner.ep)
            first, last = (line, local % share, local), (row.expert % share, row.ep)
        whole = row.expert is None
        keys += [(at, not whole, first, index, last, row.stage, number) for index in range(len(row.sources))]
    for _, _, _, index, _, _, number in sorted(keys):
        yield exported[number], index


def _held(row: Row, index: int, learner: Grid, stages: Sequence[int]) -> list[Interval]:
    """Who holds which entries of a source, every replica."""
    held: list[Interval] = []
    expert = row.expert is not None
    for rank in range(learner.expert_tp if expert else learner.tp):
        runs: list[list[int]] = []
        slices = row.slices(learner.expert_tp if expert else learner.tp, rank)
        for start, length in sorted((cut.source_start, cut.length) for cut in slices if cut.source == index):
            if runs and runs[-1][1] == start:
                runs[-1][1] += length
            else:
                runs.append([start, start + length])
        for stage in stages:
            if row.ep is not None:
                owners = [learner.expert_rank(rank, row.ep, replica, stage) for replica in range(learner.expert_dp)]
            else:
                owners = [learner.dense_rank(rank, replica, stage) for replica in range(learner.dp)]
            held += [(owner, start, stop) for owner in owners for start, stop in runs]
    return held


def _needed(row: Row, index: int, engines: EngineGrid, experts: int, placement: Placement) -> list[Interval]:
    """Who needs which entries of a source."""
    spans = [engines.interval(row, index, experts, rank) for rank in range(engines.tp)]
    return [
        (placement.engine_process(engine * engines.tp + rank), span.start, span.stop)
        for engine in range(engines.count)
        for rank, span in enumerate(spans)
        if span
    ]


class _Bounds:
    """Adds up ``Bounds``."""

    def __init__(self, placement: Placement) -> None:
        self._nodes = np.array(placement.nodes)
        self._engines = np.array([placement.engine_process(rank) for rank in range(placement.engines)])
        self._ranks = np.zeros((3, placement.world_size), dtype=np.int64)
        self._by_node = np.zeros((2, max(placement.nodes) + 1), dtype=np.int64)
        self._full = 0

    def add(self, parts: Sequence[Segment], entry_bytes: int, tensors: int) -> None:
        """Count ``tensors`` tensors with these segments."""
        for part in parts:
            size = (part.stop - part.start) * entry_bytes * tensors
            holds = np.zeros(len(self._nodes), dtype=bool)
            holds[part.holders] = True
            self._full += size
            self._ranks[0, part.needers] += size
            for row, receivers in enumerate((part.needers, self._engines)):
                self._ranks[1 + row, receivers[~holds[receivers]]] += size
                lacks = np.zeros(self._by_node.shape[1], dtype=bool)
                lacks[self._nodes[receivers]] = True
                lacks[self._nodes[part.holders]] = False
                self._by_node[row, lacks] += size

    def finish(self) -> Bounds:
        """The sums."""
        need, ingress, full = self._ranks
        return Bounds(need, ingress, self._by_node[0], full, self._by_node[1], self._full)


def _draft(kind: _Kind, turn: int, nodes: np.ndarray, bucket_bytes: int, smallest_share: int) -> _Draft:
    """Pieces of one kind, in as many chunks as it takes for every tensor's share of a bucket to fit it."""
    parts = list(segments(kind.length, kind.held, kind.needed))
    turns = turn + np.arange(len(kind.members))
    longest = max(part.stop - part.start for part in parts)
    chunks = 1
    while True:
        table = pieces(parts, nodes, chunks, smallest_share // kind.entry_bytes)
        load = _load(table, turns, kind.entry_bytes, chunks, len(nodes))
        peak = int(load.max())
        if peak <= bucket_bytes:
            return _Draft(kind, parts, turns, table, chunks, load)
        if chunks == longest:
            raise BucketError(
                f"bucket_bytes={bucket_bytes} is too small: one process must send or receive {peak} bytes at once, "
                f"single entries of {kind.entry_bytes} bytes for all who need them; raise it to at least that"
            )
        chunks = min(longest, max(chunks + 1, -(-chunks * peak // bucket_bytes)))


@dataclass(frozen=True)
class _Draft:
    """One kind before its buckets are known."""

    kind: _Kind
    parts: list[Segment]
    turns: np.ndarray
    pieces: Pieces
    chunks: int
    load: np.ndarray  # [stage, tensors, chunks, processes]: bytes of send and receive buffers


def _load(table: Pieces, turns: np.ndarray, entry_bytes: int, chunks: int, world: int) -> np.ndarray:
    """Bytes that every process sends and receives in each stage: ``[2, tensors, chunks, processes]``."""
    load = np.zeros(2 * len(turns) * chunks * world, dtype=np.int64)
    travels = table.kind != LOCAL
    stage = (table.kind == FANOUT)[travels]
    at = ((stage * len(turns) + np.arange(len(turns))[:, None]) * chunks + table.chunk[travels]) * world
    size = np.broadcast_to(table.length[travels] * entry_bytes, at.shape).ravel()
    for processes in (table.sources(turns), table.destinations(turns)):
        np.add.at(load, (at + processes[:, travels]).ravel(), size)
    return load.reshape(2, len(turns), chunks, world)


def _buckets(drafts: Sequence[_Draft], tensors: int, bound: int) -> tuple[list[np.ndarray], int]:
    """Bucket of every chunk, ``[tensors, chunks]`` by draft, and the number of buckets.

    Buckets are as full as the bound allows.
    """
    chunks = np.zeros(tensors, dtype=np.int64)
    for draft in drafts:
        chunks[draft.kind.members] = draft.chunks
    first = np.cumsum(chunks) - chunks
    units = [first[draft.kind.members][:, None] + np.arange(draft.chunks) for draft in drafts]
    order = np.argsort(np.concatenate([unit.ravel() for unit in units]))
    loads = np.concatenate([draft.load.reshape(2, -1, draft.load.shape[-1]) for draft in drafts], axis=1)
    bucket = np.zeros(len(order), dtype=np.int64)
    start = count = 0
    window = 64
    while start < len(order):
        total = np.cumsum(loads[:, order[start : start + window]], axis=1).max(axis=(0, 2))
        fits = int(np.searchsorted(total, bound, side="right"))
        if fits == window:
            window *= 2
            continue
        bucket[start : start + fits] = count
        start, count, window = start + fits, count + 1, max(64, fits + fits // 4)
    return [bucket[unit] for unit in units], count
