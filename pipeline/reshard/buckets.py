"""Cuts an export of weights into buckets and chooses the rank that assembles each.

Pure data, the same on every rank, no collectives.

A bucket holds tensors of one pipeline stage (and one expert-parallel group). It is put together by its *owner*, a rank
of that stage that holds a part of them, out of the parts of one replica: nothing crosses stages or replicas. Owners are
dealt so that all ranks of a stage, over TP, DP and EP alike, own the same bytes to within one bucket (greedy, the
largest first: Graham 1969). Since the parts of a bucket are equal, they also send and receive the same. Buckets go out
in *rounds*: in each, every rank owns one at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import TypeAlias

from pipeline.model.fp8_layout import aligned, quantised, scale_shape
from pipeline.model.grid import Grid
from pipeline.model.layout import Piece, Row


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor of a bucket."""

    piece: Piece
    quantise: str | None  # to FP8 "before" it is gathered, by every holder; "after", by the owner; or not at all
    nbytes: int  # as it leaves the owner, the scale of FP8 codes included


@dataclass(frozen=True)
class Bucket:
    """Tensors that leave together."""

    index: int  # in the order of rounds
    owner: int  # global rank
    holders: tuple[int, ...]  # global ranks of the owner's replica, in the order of their parts
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that leave the owner."""
        return sum(entry.nbytes for entry in self.entries)


Rounds: TypeAlias = tuple[tuple[Bucket, ...], ...]


def plan(rows: Sequence[Row], grid: Grid, itemsize: int, bucket_mib: float, fp8: bool = False) -> Rounds:
    """Buckets of an export by round: each at most ``bucket_mib`` MiB, or a single tensor.

    ``rows``: of the whole model. ``itemsize``: bytes of the model's type. ``fp8``: the matrices of
    :func:`fp8_layout.quantised` leave as codes and scales in 128x128 blocks.
    """
    limit = bucket_mib * 2**20
    drafts = list(_cut(rows, grid, itemsize, limit, fp8))
    queues: defaultdict[int, list[tuple[tuple[int, ...], list[Entry]]]] = defaultdict(list)
    for entries, (owner, holders) in zip(drafts, _owners(drafts, grid, limit), strict=True):
        queues[owner].append((holders, entries))
    rounds: list[tuple[Bucket, ...]] = []
    index = 0
    for line in zip_longest(*(queues[owner] for owner in sorted(queues))):
        buckets = []
        for owner, bucket in zip(sorted(queues), line, strict=True):
            if bucket is not None:
                buckets.append(Bucket(index, owner, bucket[0], tuple(bucket[1])))
                index += 1
        rounds.append(tuple(buckets))
    return tuple(rounds)


def owned(rounds: Rounds, ranks: int) -> list[int]:
    """Bytes that leave every rank as an owner."""
    found = [0] * ranks
    for bucket in _all(rounds):
        found[bucket.owner] += bucket.nbytes
    return found


def _all(rounds: Rounds) -> Iterator[Bucket]:
    return (bucket for buckets in rounds for bucket in buckets)


def _cut(rows: Sequence[Row], grid: Grid, itemsize: int, limit: float, fp8: bool) -> Iterator[list[Entry]]:
    """Entries of every bucket: tensors that the same ranks hold.

    Where these need more than one bucket each, they get the same number of buckets, of about equal size.
    """
    groups: dict[tuple[int, int | None], list[Entry]] = {}
    for row in (row for row in rows if row.exported):
        groups.setdefault((row.stage, row.ep), []).extend(_entries(row, grid, itemsize, fp8))
    for (_, ep), entries in groups.items():
        total = sum(entry.nbytes for entry in entries)
        owners = grid.tp * grid.dp // (1 if ep is None else grid.ep)
        turns = -(-total // (limit * owners))
        yield from _fill(entries, total / (turns * owners) if turns > 1 else limit)


def _fill(entries: Iterable[Entry], limit: float) -> Iterator[list[Entry]]:
    bucket: list[Entry] = []
    size = 0
    for entry in entries:
        if bucket and size + entry.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += entry.nbytes
    yield bucket


def _entries(row: Row, grid: Grid, itemsize: int, fp8: bool) -> Iterator[Entry]:
    parts = grid.tp if row.expert is None else grid.expert_tp
    when = ("before" if aligned(row, parts) else "after") if fp8 and quantised(row) else None
    for index, source in enumerate(row.sources):
        size = prod(source.shape)
        nbytes = size * (4 if row.float32 else itemsize) if when is None else size + 4 * prod(scale_shape(source.shape))
        yield Entry(Piece(row, index), when, nbytes)


def _owners(drafts: Sequence[Sequence[Entry]], grid: Grid, limit: float) -> list[tuple[int, tuple[int, ...]]]:
    """Owner and holders of every bucket, dealt in the better of two orders for each stage.

    Tensors larger than a bucket first: what follows evens them out. Experts first, which fewer ranks hold: every
    expert-parallel group has as many bytes of experts, so no rank is ahead of the mean by more than a bucket, which the
    other order cannot promise.
    """
    sizes = [sum(entry.nbytes for entry in entries) for entries in drafts]
    rows = [entries[0].piece.row for entries in drafts]
    found: dict[int, tuple[int, tuple[int, ...]]] = {}
    for stage in sorted({row.stage for row in rows}):
        numbers = [number for number, row in enumerate(rows) if row.stage == stage]
        large_first = sorted(numbers, key=lambda n: (sizes[n] <= limit, rows[n].ep is None, -sizes[n], n))
        experts_first = sorted(numbers, key=lambda n: (rows[n].ep is None, -sizes[n], n))
        dealt = [_deal(order, rows, sizes, grid) for order in (large_first, experts_first)]
        found |= min(dealt, key=lambda each: each[0])[1]
    return [found[number] for number in range(len(drafts))]


def _deal(
    order: Sequence[int], rows: Sequence[Row], sizes: Sequence[int], grid: Grid
) -> tuple[int, dict[int, tuple[int, tuple[int, ...]]]]:
    """Give each bucket of ``order`` to the rank with the least so far.

    Returns the bytes of the busiest rank; owner and holders by bucket.
    """
    load: defaultdict[int, int] = defaultdict(int)
    found = {}
    for number in order:
        row = rows[number]
        replicas = [row.holders(grid, replica) for replica in range(grid.dp if row.ep is None else grid.expert_dp)]
        _, owner, holders = min((load[rank], rank, holders) for holders in replicas for rank in holders)
        load[owner] += sizes[number]
        found[number] = owner, holders
    return max(load.values(), default=0), found
