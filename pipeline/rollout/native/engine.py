"""The embedded rollout engine: batched sampling in this process, on the CPU, with exact log-probabilities."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pipeline.data.special_tokens import eos_token_ids
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model import architecture, fp8, layout
from pipeline.model import folder as model_folder
from pipeline.model.architecture import Architecture
from pipeline.model.reading import ModelError
from pipeline.reshard.order import Order
from pipeline.reshard.participant import Participant
from pipeline.reshard.places import HostPlaces
from pipeline.rollout.engine import EngineError, Finished, RolloutEngine, WeightUpdateError
from pipeline.rollout.native.decode import Drawn, Row, decode
from pipeline.rollout.native.decoder import AnyDecoder
from pipeline.rollout.native.fair_lock import FairLock
from pipeline.rollout.native.fallback import decoder_of
from pipeline.rollout.native.response_end import ResponseEnd
from pipeline.rollout.update_session import UpdateSession, opened
from pipeline.types import EngineHealth, GenerateRequest, Sample, SampleGroup, WeightSpan
from pipeline.units import GIB

_CACHE_BYTES = 2 * GIB  # key-value cache of one batch, at most


class NativeEngine(RolloutEngine):
    """``RolloutEngine`` in process: one decoder; calls that run at once take turns, a token of each at a time.

    So one long response holds up nobody, and a batch is always that of one call: what is drawn depends on no other
    call, to the bit. Within a call finished rows leave the batch, their groups are handed out, and rows that had no
    room take their place (``pipeline.rollout.native.decode``). A sample is a function of the weights, its prompt,
    temperature and seed. Which other rows share its batch only moves float32 rounding (relative 1e-6 in log-probs). A
    model for which there is no decoder runs in transformers' own code. Weights that come in FP8 are used at the values
    that they stand for, activations stay in float32: what remains of FP8 is the rounding of the weights.
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
            folder = model_folder.Folder(hf_path, model)
            model_folder.check(folder, layout.rows(model), model)
        except ModelError as error:
            raise EngineError(f"native engine: {error}") from error
        tensors = {name: folder.tensor(name) for name in layout.tensor_shapes(model)}
        self._model, self._hf_path, self._version = model, hf_path, 0
        self._decoder = decoder_of(model, hf_path, tensors)
        ids = eos_token_ids(hf_path) if self._eos_override is None else self._eos_override
        self._end = ResponseEnd((*ids, *self._stop_token_ids), self._stop)
        if self._stop:
            self._read_texts()

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """Groups whose responses have all ended, when rows leave the batch.

        Raises ``EngineError`` while no consistent weights are loaded.
        """
        _check_requests(requests)
        if any(request.stop for request in requests):
            self._read_texts()
        with self._serving() as (decoder, version):
            before = self._aborted
            arriving = _Arriving(requests, version)
            finished = arriving.add([])
            for drawn in decode(
                decoder,
                [row for request in requests for row in _rows(request)],
                self._end,
                partial(self._room, decoder.model),
                self._turns,
                lambda: self._aborted != before,
                record_routes=self._record_routes,
            ):
                finished += arriving.add(drawn)
                if not arriving:
                    break
                if finished:
                    yield finished
                    finished = []
        yield finished

    def _read_texts(self) -> None:
        """Be able to find stop texts in what is drawn."""
        if self._end.tokenizer is None and self._model is not None:
            self._end = replace(self._end, tokenizer=load_tokenizer(self._hf_path))

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
        session, self._session = opened(self._session, "native engine", "receive"), None
        session.expects(order)
        places = HostPlaces()
        report = self._participant.receive(order, engine, places)
        if report.error:
            raise WeightUpdateError(f"native engine: update to version {order.version}: receive: {report.error}")
        session.order, self._arrived, self._session = order, places.tensors, session

    def verify_update(self, version: int) -> None:
        """Make the decoder; every tensor's bytes were compared with their senders' digests on arrival."""
        session, self._session = opened(self._session, "native engine", "verify_update"), None
        session.received(version)
        assert self._model is not None  # begin_update saw to it
        self._verified = decoder_of(self._model, self._hf_path, fp8.values(self._arrived))
        self._arrived = {}
        session.verified()
        self._session = session

    def commit_update(self, version: int) -> None:
        """Serve ``version``."""
        session, self._session = opened(self._session, "native engine", "commit_update"), None
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

    def _refusal(self) -> str:
        if self._model is None:
            return "not started (or closed)"
        return f"a weight update after version {self._version} began and has not been committed; push the weights again"

    def _room(self, model: Architecture, columns: int) -> int:
        """How many rows may be in flight, where the cache has so many columns."""
        entries = 2 * model.kv_heads * model.head_dim  # of a layer and a token
        if model.mla:
            entries = model.heads * (model.mla.nope_dim + model.mla.rope_dim + model.mla.v_dim)
        row_bytes = 4 * model.attention_layers * entries * columns
        if model.delta:
            states = model.delta.value_heads * model.delta.key_dim * model.delta.value_dim
            row_bytes += 4 * sum(model.delta.layers) * (states + model.delta.channels * model.delta.kernel)
        return max(1, min(self._max_batch_rows, _CACHE_BYTES // max(row_bytes, 1)))


def _rows(request: GenerateRequest) -> list[Row]:
    given = request.prompt.token_ids, request.temperature, request.max_new_tokens, request.top_p
    rows = [
        Row(given[0], seed, *given[1:], None if index < request.usual else request.cuts, stop=request.stop)
        for index, seed in enumerate(request.seeds)
    ]
    return [_from(row, sample) for row, sample in zip(rows, request.begun, strict=True)] if request.begun else rows


def _from(row: Row, sample: Sample) -> Row:
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


class _Arriving:
    """The groups of a call while their responses end one after the other; true while some are still to come."""

    def __init__(self, requests: Sequence[GenerateRequest], version: int) -> None:
        self._requests = requests
        self._places = [(number, place) for number, each in enumerate(requests) for place in range(len(each.seeds))]
        self._samples: dict[int, list[Sample | None]] = {i: [None] * len(r.seeds) for i, r in enumerate(requests)}
        self._version = version
        self._spans: dict[int, tuple[WeightSpan, ...]] = {}  # by tokens: samples share them, also when they are sent

    def __bool__(self) -> bool:
        return bool(self._samples)

    def add(self, drawn: Sequence[tuple[int, Drawn]]) -> Finished:
        """Responses by their numbers among those of all requests. Returns the groups that are whole now."""
        for row, response in drawn:
            number, place = self._places[row]
            self._samples[number][place] = self._sample(self._requests[number], place, response)
        whole = [number for number, samples in self._samples.items() if None not in samples]
        return [(number, self._group(number)) for number in whole]

    def _group(self, number: int) -> SampleGroup:
        request, samples = self._requests[number], self._samples.pop(number)
        return SampleGroup(request.prompt, tuple(filter(None, samples)), request.role)

    def _sample(self, request: GenerateRequest, place: int, drawn: Drawn) -> Sample:
        values = drawn.token_ids, drawn.log_probs, request.temperature, request.seeds[place], request.role
        count = len(drawn.token_ids)
        spans = self._spans.setdefault(count, (WeightSpan(self._version, 0, count),))
        return Sample(*values, drawn.finish_reason, weight_versions=spans, routes=drawn.routes)
