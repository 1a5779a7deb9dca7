"""Decides which rank sends which piece of one tensor to which rank, from the intervals they hold and need.

A piece is a row in columns of numbers.

Tensors of equal size with equal holders and equal needers (the same projection in the layers of a stage, the same
matrix of the experts of a rank) travel alike, so this is computed once for all of them; only the choice among replicas
turns from one tensor to the next. Rules, per segment of a tensor that the same ranks hold and the same ranks need:

- a process that holds what it needs copies it (``LOCAL``);
- a needer on a node where somebody holds the segment gets it from there (``NEAR``);
- any other node gets one copy (``INTER``), divided over its needers, which then pass their parts on (``FANOUT``).

Equal shares are cut with integer arithmetic, so shares differ by at most one entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

LOCAL, NEAR, INTER, FANOUT = range(4)
KINDS = ("local", "intra-node", "inter-node", "intra-node fan-out")

Interval = tuple[int, int, int]  # process, start, stop


@dataclass(frozen=True)
class Segment:
    """Entries that the same processes hold and the same processes need."""

    start: int
    stop: int
    holders: np.ndarray  # processes, ascending
    needers: np.ndarray  # processes, ascending


@dataclass(frozen=True)
class Pieces:
    """Columns, and a pool of processes.

    The source of a piece of the ``t``-th tensor is ``pool[source_at + (source_turn + t) % source_of]``.
    """

    pool: np.ndarray
    kind: np.ndarray
    chunk: np.ndarray  # bucket-sized part of the tensor
    start: np.ndarray
    length: np.ndarray
    source_at: np.ndarray
    source_of: np.ndarray  # replicas to choose from
    source_turn: np.ndarray
    destination_at: np.ndarray
    destination_of: np.ndarray
    destination_turn: np.ndarray

    def sources(self, turns: np.ndarray) -> np.ndarray:
        """Source processes, ``[len(turns), pieces]``."""
        return self.pool[self.source_at + (turns[:, None] + self.source_turn) % self.source_of]

    def destinations(self, turns: np.ndarray) -> np.ndarray:
        """Destination processes, ``[len(turns), pieces]``."""
        return self.pool[self.destination_at + (turns[:, None] + self.destination_turn) % self.destination_of]


def segments(length: int, held: Sequence[Interval], needed: Sequence[Interval]) -> Iterator[Segment]:
    """A tensor of ``length`` entries cut wherever an interval begins or ends."""
    holders, needers = (np.array(intervals, dtype=np.int64).reshape(-1, 3) for intervals in (held, needed))
    ends = np.unique(np.concatenate([[0, length], holders[:, 1:].ravel(), needers[:, 1:].ravel()]))
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        yield Segment(
            start,
            stop,
            *(np.sort(table[(table[:, 1] <= start) & (table[:, 2] >= stop), 0]) for table in (holders, needers)),
        )


def pieces(parts: Sequence[Segment], nodes: np.ndarray, chunks: int, grain: int) -> Pieces:
    """All pieces of a tensor whose every segment is divided over ``chunks`` buckets.

    ``nodes``: node by process. ``grain``: entries below which no piece is cut to use more replicas.
    """
    table = _Columns(nodes, grain)
    for segment in parts:
        bounds = [segment.start + (segment.stop - segment.start) * chunk // chunks for chunk in range(chunks + 1)]
        routes = table.routes(segment)
        for chunk, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                table.add(routes, chunk, start, stop - start)
    return table.finish()


@dataclass(frozen=True)
class _Routes:
    """Who sends a segment to whom.

    Lists of processes are places in the pool: where they begin and how many there are.
    """

    local: tuple[int, int]  # processes that copy
    holders: tuple[int, int]
    near: tuple[int, int]  # needers on nodes with holders
    near_holders: tuple[np.ndarray, np.ndarray]  # by near needer: holders on its node
    far_nodes: tuple[np.ndarray, np.ndarray]  # by node without holders: its needers


_COLUMNS = len(fields(Pieces)) - 1


class _Columns:
    """Collects blocks of pieces."""

    def __init__(self, nodes: np.ndarray, grain: int) -> None:
        self._nodes, self._grain = nodes, max(1, grain)
        self._pool: list[np.ndarray] = []
        self._size = 0
        self._blocks: list[np.ndarray] = []

    def routes(self, segment: Segment) -> _Routes:
        """Sort the needers of a segment into those that copy, those with a holder on their node, and the others."""
        nodes = self._nodes
        holders = segment.holders[np.argsort(nodes[segment.holders], kind="stable")]
        holds = np.zeros(len(nodes), dtype=bool)
        holds[holders] = True
        copies = holds[segment.needers]
        others = segment.needers[~copies]
        others = others[np.argsort(nodes[others], kind="stable")]
        first = np.searchsorted(nodes[holders], nodes[others], side="left")
        count = np.searchsorted(nodes[holders], nodes[others], side="right") - first
        near, far = others[count > 0], others[count == 0]
        holders_at = self._keep(holders)
        far_at = self._keep(far)
        far_first = np.flatnonzero(np.diff(nodes[far], prepend=-1))
        far_count = np.diff(far_first, append=len(far))
        return _Routes(
            local=(self._keep(segment.needers[copies]), int(copies.sum())),
            holders=(holders_at, len(holders)),
            near=(self._keep(near), len(near)),
            near_holders=(holders_at + first[count > 0], count[count > 0]),
            far_nodes=(far_at + far_first, far_count),
        )

    def add(self, routes: _Routes, chunk: int, start: int, length: int) -> None:
        """Pieces of one chunk of a segment."""
        copies = routes.local[0] + np.arange(routes.local[1])
        self._block(LOCAL, chunk, start, length, (copies, 1, 0), (copies, 1, 0))
        if routes.near[1]:
            self._near(routes, chunk, start, length)
        if len(routes.far_nodes[0]):
            self._far(routes, chunk, start, length)

    def _near(self, routes: _Routes, chunk: int, start: int, length: int) -> None:
        """Give every needer an equal share from every holder on its node.

        Takes unequal turns where shares would be too small.
        """
        at, of = routes.near_holders
        needer, share, offset, size = _divide(length, self._shares(length, of))
        self._block(
            NEAR,
            chunk,
            start + offset,
            size,
            (at[needer], of[needer], needer + share),
            (routes.near[0] + needer, 1, 0),
        )

    def _far(self, routes: _Routes, chunk: int, start: int, length: int) -> None:
        """Every node's needers get equal shares; laid end to end, these are cut into equal shares for the holders."""
        at, of = routes.far_nodes
        node, share, offset, size = _divide(length, self._shares(length, of))
        total = length * len(at)
        entry, skipped, part, turn = _cut(size, int(self._shares(total, np.array([routes.holders[1]]))[0]))
        self._block(
            INTER,
            chunk,
            start + offset[entry] + skipped,
            part,
            (routes.holders[0], routes.holders[1], turn),
            (at[node[entry]], of[node[entry]], share[entry]),
        )
        listeners = of[node] - 1
        entry = np.repeat(np.arange(len(node)), listeners)
        hop = np.arange(len(entry)) - np.repeat(np.cumsum(listeners) - listeners, listeners) + 1
        pool = at[node[entry]], of[node[entry]]
        self._block(
            FANOUT,
            chunk,
            start + offset[entry],
            size[entry],
            (*pool, share[entry]),
            (*pool, share[entry] + hop),
        )

    def finish(self) -> Pieces:
        """All blocks as columns."""
        return Pieces(np.concatenate(self._pool), *np.concatenate(self._blocks, axis=1))

    def _shares(self, length: int, replicas: np.ndarray) -> np.ndarray:
        """Parts into which ``length`` entries are cut to use ``replicas`` sources or entries."""
        return np.minimum(replicas, max(1, length // self._grain))

    def _keep(self, processes: np.ndarray) -> int:
        at = self._size
        self._pool.append(processes)
        self._size += len(processes)
        return at

    def _block(self, kind: int, chunk: int, start: object, length: object, source: tuple, destination: tuple) -> None:
        """One row of numbers per piece; chunks take turns like tensors."""
        block = np.empty((_COLUMNS, np.size(destination[0])), dtype=np.int64)
        turned = (*source[:2], source[2] + chunk, *destination[:2], destination[2] + chunk)
        for row, column in enumerate((kind, chunk, start, length, *turned)):
            block[row] = column
        self._blocks.append(block)


def _divide(length: int, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut ``length`` into as many equal shares as each entry of ``parts`` says.

    Returns the entry's index, share number, start and length of every share.
    """
    index = np.repeat(np.arange(len(parts)), parts)
    share = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
    start, stop = share * length // parts[index], (share + 1) * length // parts[index]
    return index, share, start, stop - start


def _cut(lengths: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lay intervals end to end and cut them into equal shares.

    Returns interval, start within it, length and share number of every piece.
    """
    ends = np.cumsum(lengths)
    cuts = np.arange(1, parts) * ends[-1] // parts
    points = np.unique(np.concatenate([[0], ends, cuts]))
    starts = points[:-1]
    interval = np.searchsorted(ends, starts, side="right")
    return (
        interval,
        starts - (ends - lengths)[interval],
        np.diff(points),
        np.searchsorted(cuts, starts, side="right"),
    )
