"""The embedded rollout engine: batched sampling in this process, on the CPU, with exact log-probabilities."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.data.special_tokens import eos_token_ids
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model import architecture, fp8, layout
from pipeline.model import folder as model_folder
from pipeline.model.architecture import Architecture, Moe
from pipeline.model.reading import ModelError
from pipeline.model.routing import number_type
from pipeline.reshard.order import Order
from pipeline.reshard.participant import Participant
from pipeline.reshard.places import HostPlaces
from pipeline.rollout.engine import EngineError, Finished, RolloutEngine, WeightUpdateError
from pipeline.rollout.native.decoder import AnyDecoder, KeyValues, Routes
from pipeline.rollout.native.fair_lock import FairLock
from pipeline.rollout.native.fallback import decoder_of
from pipeline.rollout.native.response_end import ResponseEnd
from pipeline.rollout.native.sampling import draw, nucleus, uniform_top, uniforms
from pipeline.rollout.update_session import UpdateSession
from pipeline.types import Cuts, EngineHealth, GenerateRequest, Sample, SampleGroup, WeightSpan
from pipeline.units import GIB

_CACHE_BYTES = 2 * GIB  # key-value cache of one batch, at most
_PREFILL_TOKENS = 16384  # prompt tokens of one forward pass, at most


class NativeEngine(RolloutEngine):
    """``RolloutEngine`` in process: one decoder; calls that run at once take turns, a token of each at a time.

    So one long response holds up nobody, and a batch is always that of one call: what is drawn depends on no other
    call, to the bit. A sample is a function of the weights, its prompt, temperature and seed. Which other rows share
    its batch only moves float32 rounding (relative 1e-6 in log-probs). A model for which there is no decoder runs in
    transformers' own code. Weights that come in FP8 are used at the values that they stand for, activations stay in
    float32: what remains of FP8 is the rounding of the weights.
    """

    def __init__(
        self,
        *,
        eos_token_ids: tuple[int, ...] | None = None,
        max_batch_rows: int = 1024,
        weight_sync_timeout_s: float = 600.0,
        stop: tuple[str, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
        record_routes: bool = False,
    ) -> None:
        """``eos_token_ids`` end a response; None: read them from the model folder. ``max_batch_rows`` bounds memory.

        ``stop`` and ``stop_token_ids``: texts and token ids that end a response too (``rollout.stop``).
        ``weight_sync_timeout_s``: how long an update waits for the running batch. ``record_routes``: samples of a model
        with experts carry their ``routes``.
        """
        self._timeout_s = weight_sync_timeout_s
        self._eos_override = eos_token_ids
        self._max_batch_rows = max_batch_rows
        self._record_routes = record_routes
        self._turns = FairLock()
        self._idle = threading.Condition()  # an update waits until no batch runs
        self._running = 0  # batches
        self._aborted = 0  # how often what ran was ended
        self._model: Architecture | None = None
        self._stop, self._stop_token_ids = stop, stop_token_ids
        self._end = ResponseEnd(())
        self._hf_path = Path()
        self._decoder: AnyDecoder | None = None  # None: nothing consistent is loaded
        self._version = 0
        self._session: UpdateSession | None = None
        self._participant = Participant()
        self._arrived: dict[str, torch.Tensor] = {}
        self._verified: AnyDecoder | None = None  # of an update that is yet to be committed

    def start(self, hf_path: Path) -> None:
        """Load a Hugging Face folder as version 0. Raises ``EngineError`` naming what the folder lacks."""
        try:
            model = architecture.read(hf_path)
            if self._record_routes and not model.native:
                problem = f"it records no routes of {model.family.name} models"
                raise EngineError(f"native engine: {problem}; set learner.routing_replay to off")
            folder = model_folder.Folder(hf_path)
            model_folder.check(folder, layout.rows(model), model)
        except ModelError as error:
            raise EngineError(f"native engine: {error}") from error
        tensors = {name: folder.tensor(name) for name in layout.tensor_shapes(model)}
        self._model, self._hf_path, self._version = model, hf_path, 0
        self._decoder = decoder_of(model, hf_path, tensors)
        ids = eos_token_ids(hf_path) if self._eos_override is None else self._eos_override
        tokenizer = load_tokenizer(hf_path) if self._stop else None
        self._end = ResponseEnd((*ids, *self._stop_token_ids), self._stop, tokenizer)

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """All groups at once. Raises ``EngineError`` while no consistent weights are loaded."""
        _check_requests(requests)
        with self._serving() as (decoder, version):
            before = self._aborted
            rows = [row for request in requests for row in _rows(request)]
            drawn: list[_Drawn] = []
            size = self._batch_rows(decoder.model, rows)
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                drawn += _decode(
                    decoder, part, self._end, self._turns, lambda: self._aborted != before, self._record_routes
                )
        yield list(enumerate(_as_groups(requests, drawn, version)))

    @contextmanager
    def _serving(self) -> Iterator[tuple[AnyDecoder, int]]:
        """The weights in force: an update that begins meanwhile waits for this batch, but takes them away at once."""
        with self._idle:
            decoder, version = self._decoder, self._version
            if decoder is None:
                raise EngineError(f"native engine: {self._refusal()}")
            self._running += 1
        try:
            yield decoder, version
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def begin_update(self, version: int) -> None:
        """Wait for the running batch, then refuse to generate until version ``version`` is committed."""
        if self._model is None:
            raise EngineError("native engine: begin_update before start")
        self.abort_update()  # from here on the next batch is refused
        with self._idle:
            idle = self._idle.wait_for(lambda: not self._running, self._timeout_s)
        if not idle:
            raise WeightUpdateError(
                f"native engine: update to version {version}: begin_update: the running batch did not end within "
                f"{self._timeout_s:g} s; raise rollout.weight_sync_timeout_s or lower rollout.max_new_tokens"
            )
        self._session = UpdateSession("native engine", version)

    def receive(self, order: Order, engine: int = 0) -> None:
        """Take whole tensors; on ``WeightUpdateError`` the whole update must start again."""
        session, self._session = self._open_session("receive"), None
        session.expects(order)
        places = HostPlaces()
        report = self._participant.receive(order, engine, places)
        if report.error:
            raise WeightUpdateError(f"native engine: update to version {order.version}: receive: {report.error}")
        session.order, self._arrived, self._session = order, places.tensors, session

    def verify_update(self, version: int) -> None:
        """Make the decoder; every tensor's bytes were compared with their senders' digests on arrival."""
        session, self._session = self._open_session("verify_update"), None
        session.received(version)
        assert self._model is not None  # begin_update saw to it
        self._verified = decoder_of(self._model, self._hf_path, fp8.values(self._arrived))
        self._arrived = {}
        session.verified()
        self._session = session

    def commit_update(self, version: int) -> None:
        """Serve ``version``."""
        session, self._session = self._open_session("commit_update"), None
        session.commit(version)
        self._decoder, self._version, self._verified = self._verified, version, None

    def release(self) -> None:
        """It has nothing on a GPU."""

    def abort_update(self) -> None:
        """Drop what has arrived."""
        self._decoder, self._session, self._arrived, self._verified = None, None, {}, None

    def abort(self) -> None:
        """End every running batch after its current token."""
        self._aborted += 1

    def health(self) -> EngineHealth:
        """Alive once started; the version is None while no consistent weights are loaded."""
        serving = self._decoder is not None
        return EngineHealth(
            self._model is not None, self._version if serving else None, "" if serving else self._refusal()
        )

    def close(self) -> None:
        """Drop the weights."""
        self._model = None
        self._participant.close()
        self.abort_update()

    def _open_session(self, operation: str) -> UpdateSession:
        if self._session is None:
            raise WeightUpdateError(f"native engine: {operation} outside an update; call begin_update (again) first")
        return self._session

    def _refusal(self) -> str:
        if self._model is None:
            return "not started (or closed)"
        return f"a weight update after version {self._version} began and has not been committed; push the weights again"

    def _batch_rows(self, model: Architecture, rows: Sequence[_Row]) -> int:
        columns = max((len(row.prompt) for row in rows), default=0) + max((row.limit for row in rows), default=0)
        entries = 2 * model.kv_heads * model.head_dim  # of a layer and a token
        if model.mla:
            entries = model.heads * (model.mla.nope_dim + model.mla.rope_dim + model.mla.v_dim)
        row_bytes = 4 * model.layers * entries * columns
        return max(1, min(self._max_batch_rows, _CACHE_BYTES // max(row_bytes, 1)))


@dataclass(frozen=True)
class _Row:
    prompt: tuple[int, ...]
    seed: int
    temperature: float
    limit: int  # new tokens, at most
    top_p: float = 1.0
    cuts: Cuts | None = None
    begun: int = 0  # response tokens at the end of ``prompt``


@dataclass(frozen=True)
class _Drawn:
    token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: str
    routes: np.ndarray | None


def _rows(request: GenerateRequest) -> list[_Row]:
    given = request.prompt.token_ids, request.temperature, request.max_new_tokens, request.top_p
    usual = len(request.seeds) - (request.cuts.samples if request.cuts else 0)
    rows = [
        _Row(given[0], seed, *given[1:], None if index < usual else request.cuts)
        for index, seed in enumerate(request.seeds)
    ]
    return [_from(row, sample) for row, sample in zip(rows, request.begun, strict=True)] if request.begun else rows


def _from(row: _Row, sample: Sample) -> _Row:
    """The row that goes on with ``sample``."""
    count = len(sample.token_ids)
    cuts = row.cuts and replace(row.cuts, warmup_tokens=max(0, row.cuts.warmup_tokens - count))
    prompt = (*row.prompt, *sample.token_ids.tolist())
    return replace(row, prompt=prompt, limit=row.limit - count, cuts=cuts, begun=count)


def _check_requests(requests: Sequence[GenerateRequest]) -> None:
    for request in requests:
        if not request.prompt.token_ids or request.temperature <= 0 or request.max_new_tokens < 1:
            raise EngineError(
                f"prompt {request.prompt.id!r}: needs at least one prompt token (has {len(request.prompt.token_ids)}), "
                f"temperature > 0 (is {request.temperature}) and max_new_tokens >= 1 (is {request.max_new_tokens})"
            )


def _as_groups(requests: Sequence[GenerateRequest], drawn: list[_Drawn], version: int) -> list[SampleGroup]:
    results = iter(drawn)
    spans = {n: (WeightSpan(version, 0, n),) for n in {len(row.token_ids) for row in drawn}}
    groups = []
    for request in requests:
        samples = []
        for seed, row in zip(request.seeds, results, strict=False):
            values = (row.token_ids, row.log_probs, request.temperature, seed, request.role, row.finish_reason)
            samples.append(Sample(*values, weight_versions=spans[len(row.token_ids)], routes=row.routes))
        groups.append(SampleGroup(request.prompt, tuple(samples), request.role))
    return groups


@torch.inference_mode()
def _decode(
    decoder: AnyDecoder,
    rows: Sequence[_Row],
    end: ResponseEnd,
    turns: FairLock,
    aborted: Callable[[], bool],
    record_routes: bool,
) -> list[_Drawn]:
    """Draw all rows of one batch, token by token, dropping finished rows once they are half of the batch."""
    limits = torch.tensor([row.limit for row in rows])
    longest = int(limits.max())
    temperatures = torch.tensor([row.temperature for row in rows], dtype=torch.float32)[:, None]
    shares = torch.tensor([row.top_p for row in rows], dtype=torch.float32)[:, None]
    cuts = [row.cuts for row in rows]
    begun = torch.tensor([row.begun for row in rows], dtype=torch.int64)[:, None]
    numbers = uniforms(torch.tensor([row.seed for row in rows], dtype=torch.int64), longest, begun)
    prompts = [row.prompt for row in rows]
    record = _Record(decoder.model.moe, prompts, longest) if record_routes and decoder.model.moe else None
    with turns:
        batch = _prefill(decoder, prompts, longest, record)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    log_probs = torch.zeros(len(rows), longest)
    lengths, stopped = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.bool)
    live = torch.arange(len(rows))  # which row each line of the batch is
    running = torch.ones(len(rows), dtype=torch.bool)  # per line of the batch
    for t in range(longest):
        scaled = (batch.logits / temperatures).log_softmax(-1)
        token = draw(nucleus(_by_rule(scaled, cuts, t), shares), numbers[:, t])
        tokens[live, t] = token
        log_probs[live, t] = scaled.gather(1, token[:, None]).squeeze(1)
        lengths[live] += running
        stopped[live] |= running & end.reached(tokens[live, max(0, t + 1 - end.window) : t + 1])
        running &= ~stopped[live] & (t + 1 < limits)
        remaining = int(running.sum())
        if remaining == 0 or aborted():
            break
        if 2 * remaining <= len(live):
            keep = running.nonzero().squeeze(1)
            live, running, token, limits = live[keep], running[keep], token[keep], limits[keep]
            temperatures, numbers, shares = temperatures[keep], numbers[keep], shares[keep]
            cuts = [cuts[i] for i in keep.tolist()]
            batch.keep(keep)
        with turns:
            batch.advance(decoder, token, t, record.heard if record else None)
        if record:
            record.keep_token(live, t)
    return _cut(rows, tokens, log_probs, lengths, stopped, record)


def _by_rule(log_probs: torch.Tensor, cuts: Sequence[Cuts | None], t: int) -> torch.Tensor:
    """What response token ``t`` of every line is drawn from, ``[rows, vocab]``."""
    for rule in {each for each in cuts if each is not None and t >= each.warmup_tokens}:
        lines = torch.tensor([each == rule for each in cuts])[:, None]
        log_probs = torch.where(lines, uniform_top(log_probs, rule.top, rule.floor), log_probs)
    return log_probs


def _cut(
    rows: Sequence[_Row],
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    stopped: torch.Tensor,
    record: _Record | None,
) -> list[_Drawn]:
    drawn = []
    token_array, log_prob_array = tokens.numpy(), log_probs.numpy()
    for i, (row, n, stop) in enumerate(zip(rows, lengths.tolist(), stopped.tolist(), strict=True)):
        reason = "stop" if stop else "length" if n == row.limit else "abort"
        routes = None if record is None else record.of(i, n)
        drawn.append(_Drawn(token_array[i, :n], log_prob_array[i, :n], reason, routes))
    return drawn


class _Record:
    """The routes of the rows of one batch."""

    def __init__(self, moe: Moe, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> None:
        self._lengths = torch.tensor([len(prompt) for prompt in prompts])
        shape = (len(prompts), int(self._lengths.max()) + new_tokens, sum(moe.layers), moe.top_k)
        self._routes = np.zeros(shape, number_type(moe))
        self.heard: Routes = []  # what the decoder said, to be kept

    def keep_prompts(self, rows: torch.Tensor, source: torch.Tensor) -> None:
        """Keep what was heard, ``[prompts, length, top_k]`` by layer: ``source`` is the prompt of each of ``rows``."""
        layers = torch.stack(self.heard, dim=2)[source].numpy()
        self._routes[rows.numpy(), : layers.shape[1]] = layers
        self.heard.clear()

    def keep_token(self, rows: torch.Tensor, t: int) -> None:
        """Keep what was heard, ``[rows, top_k]`` by layer, for response token ``t`` of ``rows``."""
        self._routes[rows.numpy(), (self._lengths[rows] + t).numpy()] = torch.stack(self.heard, dim=1).numpy()
        self.heard.clear()

    def of(self, row: int, tokens: int) -> np.ndarray:
        """Those of a row of so many response tokens, the last of which nothing read."""
        return self._routes[row, : int(self._lengths[row]) + tokens - 1].copy()


@dataclass
class _Batch:
    """Rows in flight.

    Prompts end at the same cache column (``width``); shorter ones leave columns empty on the left.
    """

    logits: torch.Tensor  # [rows, vocab], of the next token
    cache: KeyValues
    padding: torch.Tensor | None  # see Decoder.step
    prompt_lengths: torch.Tensor  # int64 [rows]
    width: int

    def advance(self, decoder: AnyDecoder, token: torch.Tensor, t: int, routes: Routes | None) -> None:
        """Feed response token ``t`` of every row."""
        self.logits = decoder.step(token, self.prompt_lengths + t, self.cache, self.width + t, self.padding, routes)

    def keep(self, lines: torch.Tensor) -> None:
        """Drop all other lines."""
        self.cache = [(keys[lines], values[lines]) for keys, values in self.cache]
        self.padding = None if self.padding is None else self.padding[lines]
        self.prompt_lengths = self.prompt_lengths[lines]


def _prefill(
    decoder: AnyDecoder, prompts: Sequence[tuple[int, ...]], new_tokens: int, record: _Record | None
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
                record.keep_prompts(rows, source)
            logits[rows] = decoder.logits(hidden[:, -1])[source]
            if not cache:
                shapes = [[(len(prompts), x.shape[1], width + new_tokens, x.shape[3]) for x in two] for two in computed]
                cache = [(allocate(keys), allocate(values)) for keys, values in shapes]
            for (keys, values), (new_keys, new_values) in zip(cache, computed, strict=True):
                keys[rows, :, width - length : width] = new_keys[source]
                values[rows, :, width - length : width] = new_values[source]
    padding = None
    if ragged:
        empty = torch.arange(width + new_tokens) < (width - lengths)[:, None]
        padding = torch.zeros(empty.shape).masked_fill_(empty, -torch.inf)
    return _Batch(logits, cache, padding, lengths, width)
