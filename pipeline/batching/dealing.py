"""How a step's rows are cut: into mini-batches (optimizer steps), over data-parallel ranks, into micro-batches. Pure
functions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from pipeline.batching.partition import best_fit, partition
from pipeline.types import PER_TOKEN, Share, TrainBatch, shares
from pipeline.units import round_up


def mini_batches(auxiliary: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The rows of ``count`` mini-batches: main rows dealt out in turn and auxiliary rows likewise, so that each has its
    share of both.

    ``auxiliary``: bool ``[rows]``. Weights are left alone: the caller multiplies each mini-batch's loss by ``count``.
    Then the mean of the mini-batch gradients, at equal parameters, is exactly the gradient of the whole batch, however
    unequal their token counts.
    """
    if count == 1:
        return [torch.arange(len(auxiliary))]
    main, added = (~auxiliary).nonzero()[:, 0], auxiliary.nonzero()[:, 0]
    if len(main) < count:
        raise ValueError(
            f"learner.updates_per_step={count} needs at least as many main rows; the batch has {len(main)}"
        )
    return [torch.cat([main[i::count], added[i::count]]) for i in range(count)]


@dataclass(frozen=True)
class Cut:
    """What a micro-batch may hold, and what its sequences look like."""

    max_rows: int = 0  # 0: any number
    max_tokens: int = 0  # positions, as below; rounded up to a multiple of ``align``; 0: any number
    packed: bool = False  # rows joined to one sequence; else a grid, padded to its longest row
    align: int = 1  # sequences are padded to a multiple of this
    row_align: int = 1  # and rows within a packed sequence to one of this, which divides ``align``
    multiple_of: int = 1  # of which the number of micro-batches per rank is one

    def positions(self, lengths: Sequence[int]) -> int:
        """Tokens computed for one micro-batch of rows of these lengths, padding included."""
        return (
            self.aligned(sum(map(self.row, lengths)))
            if self.packed
            else len(lengths) * self.aligned(max(lengths, default=0))
        )

    def micro_batches(self, needed: int) -> int:
        """The number of micro-batches of each rank where ``needed`` would do."""
        return round_up(needed, self.multiple_of)

    def row(self, tokens: int) -> int:
        """A packed row of so many tokens, and its padding."""
        return round_up(tokens, self.row_align)

    def aligned(self, tokens: int) -> int:
        """``tokens`` and the padding behind them."""
        return round_up(tokens, self.align)


def micro_batches(lengths: Sequence[int], ranks: int, cut: Cut) -> list[list[list[int]]]:
    """Row indices ``[rank][micro-batch][row]``, for rows of ``lengths`` input tokens (at least 1 each) over
    data-parallel ranks.

    Promised, whatever the lengths; ``positions`` are tokens computed, padding included:

    - every row once; the same answer on every rank, without communication;
    - as many micro-batches on every rank, a multiple of ``cut.multiple_of``; some are empty where rows are too few for
      that;
    - none has more than ``cut.max_rows`` rows or ``cut.max_tokens`` positions;
    - the ranks' work differs by no more than the largest row (packed; work: tokens) or micro-batch (grid; work:
      positions), so the busiest has at most ``mean + (1 - 1/ranks) * largest``: at most 5 % over the mean where the
      largest is 5 % of it.

    Micro-batches are of nearly equal work, which suits pipelines and expert parallelism, and every rank begins with its
    largest: if that fits into memory, all do. Of attention's work the part that grows with the square of the length is
    not counted.

    Raises ``ValueError`` on a row longer than the budget.
    """
    return [[list(rows) for rows in own] for own in _dealt(tuple(lengths), ranks, cut)]


@lru_cache(maxsize=1)  # the log-probs of a step, its reference's and its update cut the same rows
def _dealt(lengths: tuple[int, ...], ranks: int, cut: Cut) -> list[list[list[int]]]:
    """What ``micro_batches`` promises."""
    dealt = (_pack if cut.packed else _runs)(lengths, ranks, _budget(lengths, cut), cut)
    return [sorted(map(sorted, own), key=lambda rows: -cut.positions([lengths[row] for row in rows])) for own in dealt]


def _budget(lengths: Sequence[int], cut: Cut) -> int:
    """Most positions of one micro-batch."""
    longest = max(lengths)
    if not cut.max_tokens:
        return len(lengths) * cut.aligned(longest)
    if longest > cut.max_tokens:
        raise ValueError(
            f"learner.max_tokens_per_micro_batch={cut.max_tokens} cannot hold a row of {longest} tokens: raise it to "
            "rollout.max_prompt_tokens + rollout.max_new_tokens"
        )
    return cut.aligned(cut.max_tokens)


def _pack(lengths: Sequence[int], ranks: int, budget: int, cut: Cut) -> list[list[list[int]]]:
    """Packed micro-batches per rank: as many as best fit needs on the rank that needs most, of even work where that
    fits the ``budget``.
    """
    lengths = list(map(cut.row, lengths))
    shares = partition(lengths, ranks)
    loads = [[lengths[row] for row in own] for own in shares]
    fitted = [best_fit(own, budget) for own in loads]
    each = cut.micro_batches(max(map(len, fitted)))
    dealt = []
    for own, load, fit in zip(shares, loads, fitted, strict=True):
        packs = partition(load, each)
        if max(sum(load[i] for i in pack) for pack in packs) > budget:
            packs = fit + [[] for _ in range(each - len(fit))]
        dealt.append([[own[i] for i in pack] for pack in packs])
    return dealt


def _runs(lengths: Sequence[int], ranks: int, budget: int, cut: Cut) -> list[list[list[int]]]:
    """As few grids per rank as hold the rows within the ``budget``.

    Grids are runs of the rows in order of length (neighbours waste the least padding), cut so that the largest is as
    small as can be.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    widths = [cut.aligned(lengths[row]) for row in order]
    fewest = len(_starts(widths, 1, budget, cut.max_rows))
    parts = ranks * cut.micro_batches(-(-fewest // ranks))
    caps = range(widths[0], budget)
    cap = widths[0] + bisect_left(caps, True, key=lambda cap: len(_starts(widths, parts, cap, cut.max_rows)) <= parts)
    starts = _starts(widths, parts, cap, cut.max_rows)
    runs = [order[start:end] for start, end in pairwise([*starts, len(order)])]
    runs += [[] for _ in range(parts - len(runs))]
    positions = [cut.positions([lengths[row] for row in run]) for run in runs]
    return [[runs[i] for i in own] for own in partition(positions, ranks, equal_counts=True)]


def _starts(widths: list[int], parts: int, cap: int, max_rows: int) -> list[int]:
    """Where runs begin if each takes all it may: ``cap`` positions, ``max_rows`` rows, and no row that another run is
    short of.
    """
    starts, rows = [0], len(widths)
    while True:
        most = min(cap // widths[starts[-1]], max_rows or rows)
        following = starts[-1] + max(1, min(most, rows - parts + len(starts) - starts[-1]))
        if following >= rows:
            return starts
        starts.append(following)


def deal(
    lengths: torch.Tensor, auxiliary: torch.Tensor, ranks: int, cut: Cut, updates: int
) -> list[list[list[list[int]]]]:
    """Rows ``[rank][mini-batch][micro-batch][row]`` for rows of ``lengths`` tokens, the last of which is no input."""
    dealt = []
    for mini in mini_batches(auxiliary, updates):
        rows = mini.tolist()
        ranked = micro_batches((lengths[mini] - 1).tolist(), ranks, cut)
        dealt.append([[[rows[i] for i in micro] for micro in own] for own in ranked])
    return [[mini[rank] for mini in dealt] for rank in range(ranks)]


@dataclass(frozen=True)
class Dealer:
    """How one learner deals every batch."""

    cut: Cut
    ranks: int  # data-parallel
    updates: int  # mini-batches of an update

    def shares(self, batch: TrainBatch, ranks: Iterable[int], *, for_update: bool) -> Iterator[Share]:
        """The shares of these data-parallel ranks.

        ``for_update``: in the mini-batches of an update; log-probs and statistics know one mini-batch.
        """
        updates = self.updates if for_update else 1
        dealt = deal(batch.lengths, batch.auxiliary, self.ranks, self.cut, updates)
        return shares(batch, [dealt[rank] for rank in ranks])


def dummy(batch: TrainBatch) -> TrainBatch:
    """A batch like ``batch`` of one row that no loss or metric sees: auxiliary, of weight 0, with two tokens and one
    target.

    It fills an empty micro-batch: one without targets would need care everywhere.
    """
    sizes = dict.fromkeys(PER_TOKEN, 2)
    empty = {name: value.new_zeros(sizes.get(name, 1), *value.shape[1:]) for name, value in batch.tensors().items()}
    told = {"loss_mask": [False, True], "lengths": [2], "targets": [1], "auxiliary": [True], "temperatures": [1.0]}
    given = {name: torch.tensor(value, dtype=empty[name].dtype) for name, value in told.items()}
    return replace(batch, **{**empty, **given})


def on_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """The same batch with its tensors on ``device``."""
    return replace(batch, **{name: value.to(device) for name, value in batch.tensors().items()})
