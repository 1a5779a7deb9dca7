"""The rollout engine that drives a real SGLang server over HTTP, releases 0.5.17 to 0.5.2x.

Every sample is a request of its own. Requests and responses are token ids; the server holds no tokenizer. Returned
log-probs are at the temperature of the draw and not renormalised by top-p, which is off. Weights come as
``rollout.weight_transport`` says.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from pipeline.config.schema import RolloutConfig
from pipeline.data.special_tokens import eos_token_ids
from pipeline.data.tokenizer import most_tokens
from pipeline.model import architecture, layout
from pipeline.model import folder as model_folder
from pipeline.model.architecture import Architecture
from pipeline.model.reading import ModelError
from pipeline.reshard.order import Order
from pipeline.rollout.engine import EngineError, EngineTimeoutError, Finished, RolloutEngine, WeightUpdateError
from pipeline.rollout.sglang import fp8 as sglang_fp8
from pipeline.rollout.sglang import replies, verify
from pipeline.rollout.sglang.liveness import Liveness
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.sglang.slices import SliceTransport
from pipeline.rollout.transport import Deadline, WeightTransport
from pipeline.rollout.transport_disk import DiskTransport
from pipeline.rollout.update_session import UpdateSession, opened
from pipeline.types import EngineHealth, GenerateRequest, Role, Sample, SampleGroup

if TYPE_CHECKING:
    from pipeline.rollout.sglang.client import Call, Client, Reply

_FILLED = 8  # times that what is in flight fills the KV cache if every response is as long as allowed; most are not
_QUEUED = 2  # samples in flight for each that the server runs at once: the next begins when one ends
_ABORT_TIMEOUT_S = 10.0  # the server only passes it on
_MEMORY = ("weights", "kv_cache")  # as SGLang names what it can leave (sglang/srt/constants.py)

_Row = tuple[GenerateRequest, int]  # one sample to draw: its place in the request


class SglangEngine(RolloutEngine):
    """``RolloutEngine`` over one SGLang server that it launches.

    The server seeds its own sampler: per-sample seeds decide the draw only where SGLang honours ``sampling_seed`` (on a
    GPU with ``--enable-deterministic-inference`` in ``rollout.sglang.extra_args``). On a CPU it ignores
    ``sampling_seed``: which samples are drawn there depends on the number of engines, and a resumed run does not repeat
    them bit for bit.

    ``close`` and ``start`` bring back an engine whose server died. With ``rollout.weight_dtype=fp8`` it comes up
    without weights, and refuses to generate until the first update commits.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        index: int,
        log_dir: Path,
        seed: int,
        record_routes: bool = False,
        longest: int = 0,
        own_stops: bool = False,
    ) -> None:
        """``index`` numbers the engine in messages, log file and server seed (``seed + index``). ``record_routes``:
        samples that may be trained on carry their ``routes``; the model has experts. ``longest``: tokens of a
        conversation of several turns; 0: there is one turn. ``own_stops``: requests may have ``stop`` texts.
        """
        self._config = config
        self._name = f"SGLang engine {index}"
        self._log_path = log_dir / f"sglang-{index}.log"
        self._seed = seed + index
        self._record_routes = record_routes
        self._reads_text = own_stops or bool(config.stop)
        self._longest = longest or config.max_prompt_tokens + config.max_new_tokens
        self._model: Architecture | None = None
        self._fp8 = config.weight_dtype == "fp8"
        self._scratch, self._fp8_folder = log_dir / f"weights-{index}", log_dir / f"model-fp8-{index}"
        self._server: SglangServer | None = None
        self._transport: WeightTransport | None = None
        self._stuck = ""  # why the server is to be started again although it runs
        self._eos: tuple[int, ...] = ()
        self._at_once = 1  # samples in flight
        self._client: Client | None = None
        self._connecting = threading.Lock()
        self._calls: set[Call] = set()
        self._released: list[str] = []  # kinds of GPU memory that the server has left
        self._version: int | None = None  # None: the server's weights are not consistent, or it is not up
        self._committed: set[int] = set()
        self._settled = threading.Event()  # no update is in progress
        self._session: UpdateSession | None = None

    def start(self, hf_path: Path) -> None:
        """Launch the server on the folder's weights. Raises ``EngineError`` with the end of the server's log."""
        if self._fp8:
            sglang_fp8.require_device()
        if self._record_routes and not torch.cuda.is_available():  # srt/state_capturer/base.py pins with CUDA, 0.5.21
            raise EngineError(
                f"{self._name}: learner.routing_replay=routes: SGLang records experts on a GPU only, and none is here; "
                "set it to off, or rollout.engine=native"
            )
        try:
            model, stored = architecture.read(hf_path), architecture.read_config(hf_path)
            model_folder.check(model_folder.Folder(hf_path, model), layout.rows(model), model)
        except ModelError as error:
            raise EngineError(f"{self._name}: {error}") from error
        self._eos = eos_token_ids(hf_path)
        self._model = model
        dtype = self._config.sglang.dtype
        if dtype == "auto":  # said outright, because SGLang's own auto makes float16 of float32
            dtype = architecture.stored_dtype(stored)
            # FP8 layers have 16-bit activations, and the learner has no float16 to send.
            dtype = "bfloat16" if dtype == "float16" or (self._fp8 and dtype == "float32") else dtype
        served = sglang_fp8.make_folder(hf_path, self._fp8_folder) if self._fp8 else hf_path
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            server = SglangServer(
                self._config,
                served,
                dtype=dtype,
                seed=self._seed,
                log_path=self._log_path,
                load_weights=not self._fp8,
                record_routes=self._record_routes,
                reads_text=self._reads_text,
            )
            self._server, self._stuck, self._released = server, "", []
            server.start()
            self._at_once = in_flight(server.get("/server_info"), self._longest)
            self._transport = build_transport(self._config, server, served, self._scratch)
            on_failure.pop_all()
        self._version, self._committed = (None, set()) if self._fp8 else (0, {0})
        self._settled.set()

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """Every group as it finishes. Raises ``EngineError`` when the server fails or refuses, or is dead.

        As many samples are in flight as keep the server busy (``in_flight``); the others wait here, in order. When one
        fails, all are aborted on the server. No request has a deadline. The server is dead when its
        process ended, or when it was silent for ``rollout.sglang.liveness_timeout_s``
        (``pipeline.rollout.sglang.liveness``); then it is ended too.
        """
        if self._version is None:
            raise EngineError(f"{self._name}: {self._refusal()}")
        if any(request.cuts for request in requests):
            raise EngineError(
                f"{self._name}: SGLang has no sampling rule like CUTS: set rollout.cuts.share=0, "
                "or rollout.engine=native"
            )
        empty = [(i, SampleGroup(r.prompt, (), r.role)) for i, r in enumerate(requests) if not r.seeds]
        if empty:
            yield empty
        drawn: list[dict[int, Sample]] = [{} for _ in requests]  # by place in the group
        rows = [(number, place) for number, request in enumerate(requests) for place in range(len(request.seeds))]
        with self._watched():
            for samples in self._samples([(requests[i], place) for i, place in rows], self._version):
                self._check_versions([sample for _, sample in samples])
                finished: Finished = []
                for row, sample in samples:
                    number, place = rows[row]
                    group, request = drawn[number], requests[number]
                    group[place] = sample
                    if len(group) == len(request.seeds):
                        ordered = tuple(group[each] for each in range(len(group)))
                        finished.append((number, SampleGroup(request.prompt, ordered, request.role)))
                if finished:
                    yield finished

    def release(self) -> None:
        """Have the server leave its GPU memory (SGLang's memory saver), once nothing runs. Its weights are lost.

        Asked between its last reply and its next look at the queue, SGLang would end on an assertion
        (``release_memory_occupation`` in srt/managers/scheduler_components/weight_updater.py). A flush of its cache
        waits.
        """
        if self._released:
            return
        self._version, self._session = None, None
        with self._phase("release"):
            server, deadline = self._up[0], self._deadline()
            server.post(f"/flush_cache?timeout={deadline.remaining_s():.3f}", timeout_s=deadline.remaining_s())
            server.post("/release_memory_occupation", tags=_MEMORY, timeout_s=deadline.remaining_s())
            self._released = list(_MEMORY)

    def begin_update(self, version: int) -> None:
        """Pause the server. Running requests go back to its queue and continue, with spans, after the commit."""
        self._settled.clear()
        self._version, self._session = None, None
        with self._phase("begin_update", version):
            server, transport = self._up
            deadline = self._deadline()
            self._resume("weights", deadline)
            server.post("/pause_generation", mode="retract", timeout_s=deadline.remaining_s())
            transport.begin(deadline)
        self._session = UpdateSession(self._name, version)

    def receive(self, order: Order, engine: int = 0) -> None:
        """Have the server's ranks take their slices. On ``WeightUpdateError`` the whole update must start again."""
        session, self._session = opened(self._session, self._name, "receive"), None
        session.expects(order)
        with self._phase("receive", order.version):
            _, transport = self._up
            transport.receive(order, engine, self._deadline())
        session.order, self._session = order, session

    def verify_update(self, version: int) -> None:
        """Let the server finish loading, and verify what it holds. It stays paused."""
        session, self._session = opened(self._session, self._name, "verify_update"), None
        order = session.received(version)
        with self._phase("verify_update", version):
            server, transport = self._up
            deadline = self._deadline()
            transport.verify(order, deadline)
            self._resume("kv_cache", deadline)
            verify.check(server, order, deadline)
        session.verified()
        self._session = session

    def commit_update(self, version: int) -> None:
        """Let the server continue."""
        session, self._session = opened(self._session, self._name, "commit_update"), None
        session.commit(version)
        with self._phase("commit_update", version):
            server, transport = self._up
            transport.commit()
            server.post("/continue_generation", timeout_s=self._deadline().remaining_s())
        self._committed.add(version)
        self._version = version
        self._settled.set()

    def abort_update(self) -> None:
        """Drop the update.

        The server stays as it is until the next one begins, and nothing that it draws is handed out.
        """
        self._version, self._session = None, None
        if self._transport is not None:
            self._transport.abort()
        self._settled.set()

    def abort(self) -> None:
        """End running requests; what they have so far comes back with finish_reason "abort"."""
        for call in tuple(self._calls):
            call.withdrawn = True  # first, so that no more requests follow
        self._running.post("/abort_request", abort_all=True, timeout_s=_ABORT_TIMEOUT_S)

    def health(self) -> EngineHealth:
        """Alive when the process runs and answers. Never raises."""
        if self._server is None:
            return EngineHealth(False, None, self._refusal())
        if self._stuck:
            return EngineHealth(False, None, self._stuck)
        if not self._server.alive:
            return EngineHealth(False, None, f"server process ended; log: {self._log_path}")
        # SGLang's /health generates a token, which a paused server does not.
        path = "/model_info" if self._version is None else "/health"
        if not self._server.answers(path, timeout_s=10):
            return EngineHealth(False, None, f"server runs but does not answer {path}; log: {self._log_path}")
        return EngineHealth(True, self._version, self._refusal() if self._version is None else "")

    def close(self) -> None:
        """End the server with all its processes. Idempotent."""
        self.abort_update()
        if self._transport is not None:
            if not self._stuck:
                self._transport.close()
            self._transport = None
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._server is not None:
            self._server.close()
            self._server = None

    # Generation

    def _samples(self, rows: Sequence[_Row], version: int) -> Iterator[list[tuple[int, Sample]]]:
        """What the server draws for every row, as it comes, with the row's place."""
        call = self._connected.post("/generate", [self._body(*row) for row in rows])
        self._calls.add(call)
        try:
            while call.waiting:
                yield [(i, self._sample(reply, *rows[i], version)) for i, reply in call.take()]
        finally:
            self._calls.discard(call)
            if call.waiting:  # something went wrong, or nobody wants the rest
                call.withdrawn = True
                with suppress(EngineError):  # a server that has ended; the first error says so
                    self.abort()

    def _sample(self, reply: Reply, request: GenerateRequest, place: int, version: int) -> Sample:
        """The sample that a reply is; after ``abort``, of what was never sent, what the server says of such."""
        if reply.status is None:
            return replies.aborted(request, request.seeds[place], version)
        if reply.said:
            server, url = self._running, f"{self._running.url}/generate"
            raise server.refused(url, reply.status, reply.said) if reply.status else server.lost(url, reply.said)
        try:
            model = self._model if self._recorded(request) else None
            return replies.sample(reply.body, request, request.seeds[place], model)
        except EngineError as error:
            raise EngineError(f"{self._name}: {error}; log: {self._log_path}") from error

    @property
    def _connected(self) -> Client:
        with self._connecting:  # calls that begin at once share one client, hence its limit
            if self._client is None:
                from pipeline.rollout.sglang.client import Client  # aiohttp comes with SGLang

                self._client = Client(self._running.url, self._at_once)
            return self._client

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Watch the server. A dead one is ended: every call on it fails, and ``EngineTimeoutError`` says why."""
        server, over = self._running, threading.Event()
        verdict: list[str] = []
        liveness = Liveness(server, self._config.sglang.liveness_timeout_s, lambda: self._version is not None)

        def watch() -> None:
            while not over.wait(liveness.interval_s):
                if (dead := liveness.look()) and not over.is_set():
                    self._stuck = f"{self._name}: {dead}; log: {self._log_path}; its end:\n{server.log_tail()}"
                    verdict.append(self._stuck)
                    server.close()
                    return

        # Nobody joins this thread: it may be in the middle of a look, which takes SGLang a second.
        threading.Thread(target=watch, name=f"{self._name} watch", daemon=True).start()
        try:
            yield
        except EngineError as error:
            if verdict:
                raise EngineTimeoutError(verdict[0]) from error
            raise
        finally:
            over.set()

    def _body(self, request: GenerateRequest, place: int) -> bytes:
        """What ``/generate`` is asked. The server seeds a draw by the token's position, so a response goes on as if it
        had never been held (``multinomial_with_seed`` in sglang/srt/layers/sampler.py). It looks for stop texts in as
        many of the newest tokens as its tokenizer would make of them, and one more: the pattern, which matches nothing,
        has it look in as many as the policy may spell them with (``Req._stop_match_tail_len`` in
        sglang/srt/managers/schedule_batch.py).
        """
        begun = request.begun[place].token_ids.tolist() if request.begun else []
        texts = [*self._config.stop, *request.stop]
        parameters = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_new_tokens": request.max_new_tokens - len(begun),
            "stop_token_ids": [*self._eos, *self._config.stop_token_ids],
            "stop": texts,
            "stop_regex": [f"[^\\s\\S]{{{most_tokens(texts)}}}"] if texts else [],
            "no_stop_trim": True,  # what ended a response was drawn by the policy, and is trained on
            "sampling_seed": request.seeds[place],
        }
        asked = {"input_ids": [*request.prompt.token_ids, *begun], "sampling_params": parameters}
        routes = {"return_routed_experts": True} if self._recorded(request) else {}
        return msgspec.json.encode(asked | {"return_logprob": True} | routes)

    def _recorded(self, request: GenerateRequest) -> bool:
        """Whether its samples carry routes: the learner never sees an evaluation's."""
        return self._record_routes and request.role != Role.EVALUATION

    def _check_versions(self, samples: Sequence[Sample]) -> None:
        """Refuse samples of weights that were never committed, such as those of an update that was aborted."""
        versions = {span.version for sample in samples for span in sample.weight_versions}
        if versions - self._committed:
            self._settled.wait(self._config.weight_sync_timeout_s)  # it may be about to commit
        if unknown := versions - self._committed:
            raise EngineError(
                f"{self._name}: samples came from weight versions {sorted(unknown)}, which were never committed"
            )

    # Weight update

    def _deadline(self) -> Deadline:
        return Deadline(self._config.weight_sync_timeout_s)

    @contextmanager
    def _phase(self, name: str, version: int | None = None) -> Iterator[None]:
        """One phase of an update (of version ``version``), or of the transport's life: its errors, with names."""
        what = f"{self._name}: {'weight transport' if version is None else f'update to version {version}'}: {name}"
        try:
            yield
        except EngineTimeoutError as error:
            self._stuck = (
                f"{what} took longer than {self._config.weight_sync_timeout_s:g} s; if the server is merely slow, "
                f"raise rollout.weight_sync_timeout_s; log: {self._log_path}"
            )
            raise WeightUpdateError(f"{self._stuck} ({error})") from error
        except (EngineError, OSError) as error:
            raise WeightUpdateError(f"{what}: {error}") from error

    def _resume(self, kind: str, deadline: Deadline) -> None:
        """Have the server take a kind of memory again, if it had left it; its content is lost."""
        if kind in self._released:
            self._running.post("/resume_memory_occupation", tags=[kind], timeout_s=deadline.remaining_s())
            self._released.remove(kind)

    @property
    def _up(self) -> tuple[SglangServer, WeightTransport]:
        if self._server is None or self._transport is None:
            raise EngineError(self._refusal())
        return self._server, self._transport

    @property
    def _running(self) -> SglangServer:
        if self._server is None:
            raise EngineError(f"{self._name}: {self._refusal()}")
        return self._server

    def _refusal(self) -> str:
        if self._server is None:
            return "not started (or closed)"
        if self._released:
            return "it has left its GPUs to the learner; push the weights first"
        if not self._committed:
            return "it has no weights yet; push them first"
        return "a weight update began and has not been committed; push the weights again"


def in_flight(info: Mapping[str, Any], longest: int) -> int:
    """Samples in flight that keep a server busy and do not drown it.

    ``info``: its /server_info. ``longest``: tokens of the longest sample, what led to it included.
    """
    fits = _FILLED * (int(info["max_total_num_tokens"]) // longest)
    running = [state.get("effective_max_running_requests_per_dp") for state in info.get("internal_states", ())]
    return max(1, min([fits, *(_QUEUED * int(most) for most in running if most)]))


def build_transport(config: RolloutConfig, server: SglangServer, hf_path: Path, scratch: Path) -> WeightTransport:
    """What ``rollout.weight_transport`` names.

    ``hf_path``: the model folder; ``scratch``: a folder for what an update leaves on the disk.
    """
    if config.weight_transport == "disk":
        return DiskTransport(server, hf_path, scratch)
    return SliceTransport(server, config.tensor_parallel_size, scratch)
