"""Numbers dealt into parts of nearly equal sum."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort, insort_left
from collections.abc import Sequence

Part = tuple[int, list[int]]  # sum, and the items that make it up


def partition(loads: Sequence[int], parts: int, *, equal_counts: bool = False) -> list[list[int]]:
    """Indices of ``loads`` (at least 0) in ``parts`` lists of nearly equal sum: the largest differencing method.

    Karmarkar and Karp 1982: put the two least balanced partial solutions on top of each other, the fullest part of one
    over the emptiest of the other, until one is left. With ``equal_counts`` partial solutions start with an item in
    every part, so that the numbers of items differ by at most one (Yakir's balanced variant, 1996).

    Promised: every index once; the same answer for the same input; the largest and the smallest sum differ by no more
    than the largest load (with ``equal_counts``: than the loads of some ``parts`` consecutive ones in order of size),
    hence ``largest sum <= mean + (1 - 1/parts) * largest load``; no empty part where there are loads enough. Against
    the best possible largest sum: at most 4/3 of it (Michiels et al. 2007), without ``equal_counts``; in practice
    within a fraction of a percent.
    """
    order = sorted(range(len(loads)), key=lambda index: -loads[index])
    step = parts if equal_counts else 1
    heap = []
    for start in range(0, len(order), step):
        solution = [(loads[index], [index]) for index in order[start : start + step]]
        heap.append((-_spread(solution, parts), start, solution))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, first, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        merged = _merge(one, other, parts)
        heapq.heappush(heap, (-_spread(merged, parts), first, merged))
    filled = [items for _, items in heap[0][2]] if heap else []
    return filled + [[] for _ in range(parts - len(filled))]


def best_fit(loads: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``loads`` (each at most ``capacity``) in few lists of at most ``capacity`` each: best fit, largest
    first.

    Every load goes where it leaves the least room. Promised: no more than 11/9 of the fewest lists there can be, and
    one (Johnson 1974); any two lists together hold more than ``capacity``.
    """
    parts: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left of the capacity, and the list; in order
    for index in sorted(range(len(loads)), key=lambda index: -loads[index]):
        at = bisect_left(rooms, (loads[index],))
        if at == len(rooms):
            rooms.append((capacity, len(parts)))
            parts.append([])
        room, part = rooms.pop(at)
        parts[part].append(index)
        insort(rooms, (room - loads[index], part))
    return parts


def _spread(solution: list[Part], parts: int) -> int:
    """Fullest less emptiest part; ``solution`` leaves out parts without items."""
    return solution[0][0] - (solution[-1][0] if len(solution) == parts else 0)


def _merge(one: list[Part], other: list[Part], parts: int) -> list[Part]:
    """Both, fullest first as each of them is: what does not fit into ``parts`` is put together, large with small.

    The larger list takes the others in, one by one: one of thousands meets a single item most of the time. Of equal
    sums those of ``one`` come first, then ``other``'s, then those that were put together.
    """
    both = max(0, len(one) + len(other) - parts)
    alone, rest = len(one) - both, len(other) - both
    pairs = [(x + y, items + more) for (x, items), (y, more) in zip(one[alone:], reversed(other[rest:]), strict=True)]
    del one[alone:], other[rest:]
    merged, fewer, insert = (one, other, insort) if alone >= rest else (other, one[::-1], insort_left)
    for part in fewer:
        insert(merged, part, key=_falling)
    for part in pairs:
        insort(merged, part, key=_falling)
    return merged


def _falling(part: Part) -> int:
    return -part[0]
