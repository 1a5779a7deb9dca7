"""Draws responses token by token, many at once: finished ones leave the batch, and those that wait take their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.model.architecture import Moe
from pipeline.model.routing import number_type
from pipeline.rollout.native.decoder import AnyDecoder, KeyValues, Routes, State
from pipeline.rollout.native.fair_lock import FairLock
from pipeline.rollout.native.response_end import ResponseEnd
from pipeline.rollout.native.sampling import draw, nucleus, uniform_top, uniforms
from pipeline.types import Cuts

_PREFILL_TOKENS = 16384  # prompt tokens of one forward pass, at most


@dataclass(frozen=True)
class Row:
    """One response that is to be drawn."""

    prompt: tuple[int, ...]
    seed: int
    temperature: float
    limit: int  # new tokens, at most
    top_p: float = 1.0
    cuts: Cuts | None = None
    begun: int = 0  # response tokens at the end of ``prompt``
    stop: tuple[str, ...] = ()  # texts that end this response too


@dataclass(frozen=True)
class Drawn:
    """One response, as far as it came."""

    token_ids: np.ndarray  # int64 [n]
    log_probs: np.ndarray  # float32 [n]
    finish_reason: str  # as a sample's
    routes: np.ndarray | None  # as a sample's


@torch.inference_mode()
def decode(
    decoder: AnyDecoder,
    rows: Sequence[Row],
    end: ResponseEnd,
    room: Callable[[int], int],
    turns: FairLock,
    aborted: Callable[[], bool],
    *,
    record_routes: bool = False,
) -> Iterator[list[tuple[int, Drawn]]]:
    """Every response by its number among ``rows``, some at a time.

    Finished rows stay until they are half of the batch: to copy the cache for every one would cost more than they do.
    Then they are handed out, and rows that wait take their place. Which rows share a batch follows from ``rows``.

    Args:
        room: how many rows may be in flight, at least one, where the cache has so many columns.
        turns: taken for every pass through the model.
        aborted: whether to end after the current token. Rows that still wait then come back empty.
    """
    responses = _Responses(decoder, rows, end, record_routes)
    batch: _Batch | None = None
    waiting = 0  # the first row that waits
    may_join = True
    while batch is not None or waiting < len(rows):
        if may_join and (count := responses.count_that_fits(batch, waiting, room)):
            with turns:
                new = responses.begin(range(waiting, waiting + count))
                batch = new if batch is None else responses.merge(batch, new)
            waiting += count
        assert batch is not None  # an empty one has room for a row
        token, running = responses.draw(batch)
        if aborted():
            yield responses.cut([*batch.rows.tolist(), *range(waiting, len(rows))])
            return
        may_join = 2 * int(running.sum()) <= len(running)
        if may_join:
            yield responses.cut(batch.rows[~running].tolist())
            if not bool(running.any()):
                batch = None
                continue
            token = token[running]
            batch.keep(running)
        with turns:
            responses.advance(batch, token)


class _Responses:
    """Every response of a call, drawn or not, and what its tokens are drawn by."""

    def __init__(self, decoder: AnyDecoder, rows: Sequence[Row], end: ResponseEnd, record_routes: bool) -> None:
        self._decoder, self._rows, self._end = decoder, rows, end
        self._stops = [row.stop for row in rows]
        self._longest = longest = max((row.limit for row in rows), default=0)
        self._prompts = torch.tensor([len(row.prompt) for row in rows], dtype=torch.int64)
        self._limits = torch.tensor([row.limit for row in rows], dtype=torch.int64)
        self._temperatures = torch.tensor([row.temperature for row in rows], dtype=torch.float32)[:, None]
        self._shares = torch.tensor([row.top_p for row in rows], dtype=torch.float32)[:, None]
        rules = {row.cuts for row in rows if row.cuts is not None}
        self._cuts = {rule: torch.tensor([row.cuts == rule for row in rows]) for rule in rules}
        # One column more than a response has tokens: what is drawn of a finished row goes there.
        self._tokens = torch.zeros(len(rows), longest + 1, dtype=torch.int64)
        self._log_probs = torch.zeros(len(rows), longest + 1)
        self._counts = torch.zeros(len(rows), dtype=torch.int64)
        self._stopped = torch.zeros(len(rows), dtype=torch.bool)
        moe = decoder.model.moe if record_routes else None
        self._record = _Record(moe, self._prompts, longest) if moe and rows else None

    def count_that_fits(self, batch: _Batch | None, waiting: int, room: Callable[[int], int]) -> int:
        """Rows from number ``waiting`` on that may join ``batch``."""
        if waiting == len(self._rows):
            return 0
        width, left, lines = int(self._prompts[waiting:].max()), int(self._limits[waiting:].max()), 0
        if batch is not None:
            width, left, lines = max(width, batch.width), max(left, self._left(batch)), len(batch.rows)
        return max(0, min(room(width + left) - lines, len(self._rows) - waiting))

    def begin(self, numbers: range) -> _Batch:
        """A batch of the rows of these numbers, their prompts read."""
        longest = int(self._limits[numbers.start : numbers.stop].max())
        chosen = self._rows[numbers.start : numbers.stop]
        seeds = torch.tensor([row.seed for row in chosen], dtype=torch.int64)
        begun = torch.tensor([row.begun for row in chosen], dtype=torch.int64)[:, None]
        uniform = uniforms(seeds, self._longest + 1, begun)
        rows = torch.tensor(numbers, dtype=torch.int64)
        return _prefill(self._decoder, [row.prompt for row in chosen], longest, self._record, rows, uniform)

    def merge(self, one: _Batch, other: _Batch) -> _Batch:
        """Both batches as one: what each row has read ends at the same column."""
        width = max(one.width, other.width)
        columns = width + max(self._left(one), self._left(other))
        self._decoder.reserve(columns)
        return _merged(one, other, width, columns)

    def _left(self, batch: _Batch) -> int:
        """Tokens that a row of the batch may still get, at most."""
        return int((self._limits[batch.rows] - self._counts[batch.rows]).max())

    def draw(self, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of every row of the batch, int64 ``[lines]``, and which rows go on after it, bool."""
        rows, t = batch.rows, batch.drawn.clamp(max=self._longest)
        scaled = (batch.logits / self._temperatures[rows]).log_softmax(-1)
        cut = nucleus(self._by_rule(scaled, rows, t), self._shares[rows])
        token = draw(cut, batch.uniform.gather(1, t[:, None]).squeeze(1))
        self._tokens[rows, t] = token
        self._log_probs[rows, t] = scaled.gather(1, token[:, None]).squeeze(1)
        running = ~self._stopped[rows] & (self._counts[rows] < self._limits[rows])
        self._counts[rows] += running
        self._stopped[rows] |= running & self._end.reached(self._tokens, rows, t, self._stops)
        return token, running & ~self._stopped[rows] & (self._counts[rows] < self._limits[rows])

    def _by_rule(self, log_probs: torch.Tensor, rows: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What response token ``t`` of every line is drawn from, ``[lines, vocab]``."""
        for rule, own in self._cuts.items():
            lines = own[rows] & (t >= rule.warmup_tokens)
            if bool(lines.any()):
                log_probs = torch.where(lines[:, None], uniform_top(log_probs, rule.top, rule.floor), log_probs)
        return log_probs

    def advance(self, batch: _Batch, token: torch.Tensor) -> None:
        """Have the model read the token of every row of the batch."""
        batch.advance(self._decoder, token, self._record.heard if self._record else None)
        if self._record:
            self._record.keep_token(batch.rows, (batch.drawn - 1).clamp(max=self._longest))

    def cut(self, numbers: Sequence[int]) -> list[tuple[int, Drawn]]:
        """The responses of these numbers, as far as they are."""
        counts, stopped = self._counts.tolist(), self._stopped.tolist()
        tokens, log_probs = self._tokens.numpy(), self._log_probs.numpy()
        drawn = []
        for number in numbers:
            n = counts[number]
            reason = "stop" if stopped[number] else "length" if n == self._rows[number].limit else "abort"
            routes = self._record.of(number, n) if self._record and n else None
            drawn.append((number, Drawn(tokens[number, :n].copy(), log_probs[number, :n].copy(), reason, routes)))
        return drawn


class _Record:
    """The routes of every response of a call."""

    def __init__(self, moe: Moe, lengths: torch.Tensor, new_tokens: int) -> None:
        self._lengths = lengths
        shape = (len(lengths), int(lengths.max()) + new_tokens + 1, sum(moe.layers), moe.top_k)
        self._routes = np.zeros(shape, number_type(moe))
        self.heard: Routes = []  # what the decoder said, to be kept

    def keep_prompts(self, rows: torch.Tensor, source: torch.Tensor) -> None:
        """Keep what was heard, ``[prompts, length, top_k]`` by layer: ``source`` is the prompt of each of ``rows``."""
        layers = torch.stack(self.heard, dim=2)[source].numpy()
        self._routes[rows.numpy(), : layers.shape[1]] = layers
        self.heard.clear()

    def keep_token(self, rows: torch.Tensor, t: torch.Tensor) -> None:
        """Keep what was heard, ``[lines, top_k]`` by layer, for response token ``t`` of ``rows``."""
        self._routes[rows.numpy(), (self._lengths[rows] + t).numpy()] = torch.stack(self.heard, dim=1).numpy()
        self.heard.clear()

    def of(self, row: int, tokens: int) -> np.ndarray:
        """Those of a row of so many response tokens, the last of which nothing read."""
        return self._routes[row, : int(self._lengths[row]) + tokens - 1].copy()


@dataclass
class _Batch:
    """Rows in flight, each on a line.

    What every row has read ends before the same cache column; shorter ones leave columns empty on the left.
    """

    rows: torch.Tensor  # int64 [lines], their numbers
    uniform: torch.Tensor  # float64 [lines, tokens], what the tokens are drawn by
    drawn: torch.Tensor  # int64 [lines], tokens, also those of a row that had ended
    logits: torch.Tensor  # [lines, vocab], of the next token
    cache: KeyValues
    padding: torch.Tensor | None  # see Decoder.step
    read: torch.Tensor  # int64 [lines], tokens
    column: int

    @property
    def width(self) -> int:
        """Columns that are needed for what was read."""
        return int(self.read.max())

    def advance(self, decoder: AnyDecoder, token: torch.Tensor, routes: Routes | None) -> None:
        """Feed the next token of every line."""
        self.logits = decoder.step(token, self.read, self.cache, self.column, self.padding, routes)
        self.read, self.drawn, self.column = self.read + 1, self.drawn + 1, self.column + 1

    def keep(self, lines: torch.Tensor) -> None:
        """Drop all other lines."""
        self.rows, self.uniform, self.drawn = self.rows[lines], self.uniform[lines], self.drawn[lines]
        kept = [(first[lines], second[lines]) for first, second in self.cache]
        self.cache = [State(*new) if isinstance(old, State) else new for old, new in zip(self.cache, kept, strict=True)]
        self.padding = None if self.padding is None else self.padding[lines]
        self.read = self.read[lines]


def _merged(one: _Batch, other: _Batch, width: int, columns: int) -> _Batch:
    """Both batches, whose caches are used up: what was read ends before column ``width`` of ``columns``."""
    read = torch.cat([one.read, other.read])
    cache: KeyValues = []
    while one.cache:  # a layer at a time, so that no more than one is there twice
        ours, theirs = one.cache.pop(0), other.cache.pop(0)
        pairs = zip(ours, theirs, strict=True)
        if isinstance(ours, State):
            cache.append(State(*map(torch.cat, pairs)))
            continue
        keys, values = (
            _side_by_side([(first, one.column), (second, other.column)], width, columns) for first, second in pairs
        )
        cache.append((keys, values))
    return _Batch(
        rows=torch.cat([one.rows, other.rows]),
        uniform=torch.cat([one.uniform, other.uniform]),
        drawn=torch.cat([one.drawn, other.drawn]),
        logits=torch.cat([one.logits, other.logits]),
        cache=cache,
        padding=_padding(read, width, columns),
        read=read,
        column=width,
    )


def _side_by_side(parts: Sequence[tuple[torch.Tensor, int]], width: int, columns: int) -> torch.Tensor:
    """Keys or values of a layer: those of every part, ``[lines, kv_heads, ..., head_dim]`` until a column, end before
    column ``width`` of ``columns``.
    """
    like = parts[0][0]
    whole = like.new_zeros(sum(len(part) for part, _ in parts), like.shape[1], columns, like.shape[3])
    first = 0
    for part, column in parts:
        taken = min(column, width)
        whole[first : first + len(part), :, width - taken : width] = part[:, :, column - taken : column]
        first += len(part)
    return whole


def _empty(
    computed: tuple[torch.Tensor, torch.Tensor], rows: int, columns: int, allocate: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache of a layer for all rows, of the kind that was computed for some."""
    first, second = computed
    if isinstance(computed, State):
        return State(first.new_empty(rows, *first.shape[1:]), second.new_empty(rows, *second.shape[1:]))
    return (
        allocate(rows, first.shape[1], columns, first.shape[3]),
        allocate(rows, second.shape[1], columns, second.shape[3]),
    )


def _prefill(
    decoder: AnyDecoder,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    record: _Record | None,
    numbers: torch.Tensor,
    uniform: torch.Tensor,
) -> _Batch:
    """Run every distinct prompt once and copy its cache to its rows.

    Prompts of one length run together, so that nothing is padded.
    """
    model = decoder.model
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    decoder.reserve(width + new_tokens)
    ragged = bool((lengths != width).any())
    # Empty columns hold zeros and not garbage: masked, they still enter the sum with weight 0, and 0 * NaN is NaN.
    allocate = torch.zeros if ragged else torch.empty
    cache: KeyValues = []
    logits = torch.empty(len(prompts), model.vocab)
    rows_of: dict[int, dict[tuple[int, ...], list[int]]] = {}  # length -> prompt -> its rows
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(len(prompt), {}).setdefault(prompt, []).append(row)
    for length, group in rows_of.items():
        part = max(1, _PREFILL_TOKENS // length)
        distinct = list(group)
        for first in range(0, len(distinct), part):
            chosen = distinct[first : first + part]
            rows = torch.tensor([row for prompt in chosen for row in group[prompt]])
            source = torch.tensor([i for i, prompt in enumerate(chosen) for _ in group[prompt]])
            hidden, computed = decoder.prefill(torch.tensor(chosen), record.heard if record else None)
            if record:
                record.keep_prompts(numbers[rows], source)
            logits[rows] = decoder.logits(hidden[:, -1])[source]
            cache = cache or [_empty(layer, len(prompts), width + new_tokens, allocate) for layer in computed]
            for layer, new in zip(cache, computed, strict=True):
                for whole, values in zip(layer, new, strict=True):
                    if isinstance(layer, State):
                        whole[rows] = values[source]
                    else:
                        whole[rows, :, width - length : width] = values[source]
    return _Batch(
        rows=numbers,
        uniform=uniform,
        drawn=torch.zeros(len(prompts), dtype=torch.int64),
        logits=logits,
        cache=cache,
        padding=_padding(lengths, width, width + new_tokens) if ragged else None,
        read=lengths,
        column=width,
    )


def _padding(read: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """As ``Decoder.step`` takes it: what a row has read ends before column ``width``."""
    empty = torch.arange(columns) < (width - read)[:, None]
    return torch.zeros(empty.shape).masked_fill_(empty, -torch.inf)
