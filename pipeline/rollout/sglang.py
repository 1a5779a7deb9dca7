"""The rollout engine that drives a real SGLang server over HTTP, releases 0.5.17 to 0.5.2x.

Requests and responses are token ids; the server holds no tokenizer. Returned log-probs are at the temperature of the draw
and not renormalised by top-p, which is off. Weights travel as tensors in shared memory of this machine.
"""

from __future__ import annotations

import base64
import io
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from http import HTTPStatus
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as torch_multiprocessing

from pipeline.config.schema import RolloutConfig
from pipeline.data.special_tokens import eos_token_ids
from pipeline.rollout import hf_folder
from pipeline.rollout.decoder import FAMILIES, Decoder, DecoderConfig, token_log_probs
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.sglang_server import SglangServer
from pipeline.rollout.update_session import UpdateSession
from pipeline.types import EngineHealth, GenerateRequest, Sample, SampleGroup, WeightBucket, WeightSpan

logger = logging.getLogger(__name__)

_CALLS_IN_FLIGHT = 8  # each fills the KV cache if every response is as long as allowed; most are not
_ABORT_TIMEOUT_S = 10.0  # the server only passes it on
_READ_BACK_TENSORS = 4  # per update; another handful at each version
_READ_BACK_ROWS = 64
_PROBE_BYTES = 1 << 30  # larger models are not recomputed here to verify an update
_PROBE_TOKENS = 16
_PROBE_TOLERANCE = {torch.float32: 0.02}  # nats, mean over the probe's tokens
_PROBE_TOLERANCE_16_BIT = 0.2  # SGLang also computes in 16 bits; a random 2-layer model showed 0.03
_SHARING = threading.Lock()

_Row = tuple[GenerateRequest, int]  # one sample to draw, and its seed


class SglangEngine:
    """``RolloutEngine`` over one SGLang server that it launches.

    The server seeds its own sampler: per-sample seeds decide the draw only where SGLang honours ``sampling_seed`` (on a GPU
    with ``--enable-deterministic-inference`` in ``rollout.sglang.extra_args``). On a CPU it ignores ``sampling_seed``: which
    samples are drawn there depends on the number of engines, and a resumed run does not repeat them bit for bit.

    ``close`` and ``start`` bring back an engine whose server died.
    """

    def __init__(self, config: RolloutConfig, *, index: int, log_dir: Path, seed: int) -> None:
        """``index`` numbers the engine in messages, log file and server seed (``seed + index``)."""
        self._config = config
        self._name = f"SGLang engine {index}"
        self._log_path = log_dir / f"sglang-{index}.log"
        self._seed = seed + index
        self._server: SglangServer | None = None
        self._dtype = torch.float32
        self._eos: tuple[int, ...] = ()
        self._kv_tokens = 0  # what the server's KV cache holds
        self._aborted = threading.Event()
        self._model_config: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._version: int | None = None  # None: the server's weights are not consistent, or it is not up
        self._committed: set[int] = set()
        self._commit_lock = threading.Lock()
        self._session: UpdateSession | None = None
        self._server_session_open = False
        self._has_sessions = True  # begin/end_weight_update exist (0.5.21+); found out at the first update
        self._reads_back = False
        self._probed: DecoderConfig | None = None  # where weights cannot be read back
        self._expected: dict[str, torch.Tensor] = {}  # what to verify at commit

    def start(self, hf_path: Path) -> None:
        """Launch the server on the folder's weights. Raises ``EngineError`` with the end of the server's log."""
        self._model_config = hf_folder.read_config(hf_path)
        self._shapes = hf_folder.tensor_shapes(hf_path)
        self._eos = eos_token_ids(hf_path)
        dtype = self._config.sglang.dtype
        if dtype == "auto":  # said outright, because SGLang's own auto makes float16 of float32
            dtype = str(self._model_config.get("dtype") or self._model_config.get("torch_dtype") or "bfloat16")
        self._dtype = getattr(torch, dtype)
        self._server = SglangServer(self._config, hf_path, dtype=dtype, seed=self._seed, log_path=self._log_path)
        self._server.start()
        self._server_session_open, self._has_sessions = False, True  # this server is asked afresh
        self._kv_tokens = int(self._server.get("/server_info")["max_total_num_tokens"])
        self._reads_back = self._read_back("model.norm.weight") is not None
        self._probed = None if self._reads_back else self._probe_config()
        self._version, self._committed = 0, {0}

    def generate(self, requests: Sequence[GenerateRequest]) -> list[SampleGroup]:
        """One group per request, in order. Raises ``EngineError`` when the server fails, is late or is refusing.

        What is sent is many HTTP calls, a bounded number of them at a time, so that ``rollout.sglang.request_timeout_s`` bounds
        a limited amount of work however long the whole takes. When one fails, the rest is aborted on the server.
        """
        if self._version is None:
            raise EngineError(f"{self._name}: {self._refusal()}")
        rows = [(request, seed) for request in requests for seed in request.seeds]
        if not rows:
            return [SampleGroup(request.prompt, (), request.role) for request in requests]
        replies = self._replies(rows, self._version)
        samples = [self._sample(request, seed, reply) for (request, seed), reply in zip(rows, replies, strict=True)]
        self._check_versions(samples)
        drawn = iter(samples)
        return [SampleGroup(r.prompt, tuple(islice(drawn, len(r.seeds))), r.role) for r in requests]

    def begin_update(self, version: int) -> None:
        """Pause the server. Running requests go back to its queue and continue, with spans, after the commit."""
        self._version = None
        self._expected = {}
        with self._update_step(version, "begin_update"):
            self._running.post("/pause_generation", mode="retract")
            if self._server_session_open:  # left by an update that failed
                self._running.post("/end_weight_update")
                self._server_session_open = False
            if self._has_sessions:
                self._has_sessions = self._begin_server_session()
        self._session = UpdateSession(self._name, version, self._shapes)

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Check the bucket, then load it into the server; on ``WeightUpdateError`` the whole update must start again."""
        session, self._session = self._open_session("load_bucket"), None
        session.admit(bucket)
        with (
            self._update_step(session.version, f"load_bucket {bucket.index + 1}/{bucket.count}"),
            _shared(bucket.tensors) as payload,
        ):
            self._running.post(
                "/update_weights_from_tensor",
                serialized_named_tensors=[payload] * self._config.tensor_parallel_size,
                flush_cache=True,
                weight_version=str(session.version),
            )
        self._remember(session.version, bucket.tensors)
        self._session = session

    def commit_update(self, version: int) -> None:
        """Let the server finish loading, verify it, and continue. On ``WeightUpdateError`` it stays paused."""
        session, self._session = self._open_session("commit_update"), None
        session.finish(version)
        with self._update_step(version, "commit_update"), self._commit_lock:
            if self._has_sessions:
                self._running.post("/end_weight_update")
                self._server_session_open = False
            label = self._running.get("/model_info")["weight_version"]
            if label != str(version):
                raise EngineError(f"the server says its weights are version {label!r}")
            if self._reads_back:
                self._verify_bytes()
            self._running.post("/continue_generation")
            if self._probed is not None:
                self._verify_log_probs(self._probed)
            self._committed.add(version)
            self._version = version
        self._expected = {}

    def probe_log_probs(self, token_ids: Sequence[int]) -> np.ndarray:
        """The server's T=1 log-probs of every token but the first, float32 ``[len - 1]``; for comparison with the learner's."""
        reply = self._running.post(
            "/generate",
            input_ids=list(token_ids),
            sampling_params={"temperature": 1.0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        return np.array([entry[0] for entry in reply["meta_info"]["input_token_logprobs"][1:]], dtype=np.float32)

    def abort(self) -> None:
        """End running requests; what they have so far comes back with finish_reason "abort"."""
        self._aborted.set()  # first, so that no more calls follow
        self._running.post("/abort_request", abort_all=True, timeout_s=_ABORT_TIMEOUT_S)

    def health(self) -> EngineHealth:
        """Alive when the process runs and answers. Never raises."""
        if self._server is None:
            return EngineHealth(False, None, self._refusal())
        if not self._server.alive:
            return EngineHealth(False, None, f"server process ended; log: {self._log_path}")
        # SGLang's /health generates a token, which a paused server does not.
        path = "/model_info" if self._version is None else "/health"
        if not self._server.answers(path, timeout_s=10):
            return EngineHealth(False, None, f"server runs but does not answer {path}; log: {self._log_path}")
        return EngineHealth(True, self._version, self._refusal() if self._version is None else "")

    def close(self) -> None:
        """End the server with all its processes. Idempotent."""
        self._version, self._session = None, None
        if self._server is not None:
            self._server.close()
            self._server = None

    # Generation

    def _replies(self, rows: Sequence[_Row], version: int) -> list[Mapping[str, Any]]:
        """The server's reply for every row, in order."""
        longest = max(len(request.prompt.token_ids) + request.max_new_tokens for request, _ in rows)
        size = max(1, self._kv_tokens // longest)
        self._aborted.clear()
        with ThreadPoolExecutor(_CALLS_IN_FLIGHT, f"{self._name} call") as threads:
            calls = [
                threads.submit(self._call, rows[first : first + size], version) for first in range(0, len(rows), size)
            ]
            try:
                for call in as_completed(calls):
                    call.result()
            except (EngineError, KeyboardInterrupt):
                with suppress(EngineError):  # a server that has ended; the first error says so
                    self.abort()
                raise
        return [reply for call in calls for reply in call.result()]

    def _call(self, rows: Sequence[_Row], version: int) -> list[Mapping[str, Any]]:
        """One HTTP call; after ``abort`` none, but what the server says of a request that it aborts in its queue."""
        if self._aborted.is_set():
            return [{"meta_info": {"finish_reason": {"type": "abort"}, "weight_version": version}}] * len(rows)
        replies: list[Mapping[str, Any]] = self._running.post(
            "/generate",
            input_ids=[request.prompt.token_ids for request, _ in rows],
            sampling_params=[self._sampling_params(request, seed) for request, seed in rows],
            return_logprob=True,
        )
        return replies

    def _sampling_params(self, request: GenerateRequest, seed: int) -> dict[str, Any]:
        return {
            "temperature": request.temperature,
            "max_new_tokens": request.max_new_tokens,
            "stop_token_ids": list(self._eos),
            "sampling_seed": seed,
        }

    def _sample(self, request: GenerateRequest, seed: int, reply: Mapping[str, Any]) -> Sample:
        meta = reply["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort" and reason.get("status_code"):  # an error of the server, not our abort()
            raise EngineError(
                f"{self._name}: prompt {request.prompt.id!r}: {reason.get('message')}; log: {self._log_path}"
            )
        entries = meta.get("output_token_logprobs") or []
        # 0.5.21 reports spans; before, one version per response, which pausing by retraction keeps true only when idle.
        spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": len(entries)}]
        return Sample(
            token_ids=np.array([entry[1] for entry in entries], dtype=np.int64),
            log_probs=np.array([entry[0] for entry in entries], dtype=np.float32),
            temperature=request.temperature,
            seed=seed,
            role=request.role,
            finish_reason=reason["type"],
            weight_versions=tuple(WeightSpan(int(s["version"]), s["start"], s["end"]) for s in spans),
        )

    def _check_versions(self, samples: Sequence[Sample]) -> None:
        """Refuse samples of weights that were never committed, such as those of a commit whose verification failed."""
        with self._commit_lock:
            unknown = {span.version for sample in samples for span in sample.weight_versions} - self._committed
        if unknown:
            raise EngineError(
                f"{self._name}: samples came from weight versions {sorted(unknown)}, which were never committed"
            )

    # Weight update

    def _begin_server_session(self) -> bool:
        """Open the server's update session; False where the release has none (0.5.17 to 0.5.20 answer 404)."""
        response = self._running.send("/begin_weight_update", selector="all")
        if response.status_code == HTTPStatus.NOT_FOUND:
            return False
        self._running.check(response)
        self._server_session_open = True
        return True

    @contextmanager
    def _update_step(self, version: int, operation: str) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            raise WeightUpdateError(f"{self._name}: update to version {version}: {operation}: {error}") from error

    def _open_session(self, operation: str) -> UpdateSession:
        if self._session is None:
            raise WeightUpdateError(f"{self._name}: {operation} outside an update; call begin_update (again) first")
        return self._session

    def _remember(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what commit verifies: a few tensors' first rows, or everything where the server cannot be read."""
        if self._reads_back:
            names = sorted(self._shapes)
            chosen = {names[(version * _READ_BACK_TENSORS + i) % len(names)] for i in range(_READ_BACK_TENSORS)}
            self._expected |= {
                n: t[:_READ_BACK_ROWS].to("cpu", self._dtype, copy=True) for n, t in tensors.items() if n in chosen
            }
        elif self._probed is not None:
            self._expected |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def _probe_config(self) -> DecoderConfig | None:
        """What our own decoder needs to recompute log-probs, or None for a model that is too large or of another family."""
        size = 4 * sum(torch.Size(shape).numel() for shape in self._shapes.values())
        if size <= _PROBE_BYTES and self._model_config.get("model_type") in FAMILIES:
            return DecoderConfig.from_hf(self._model_config)
        logger.warning(
            "%s: SGLang cannot read back weights of this model, which is too large or too new to recompute here; updates are "
            "verified by checksum on arrival, by SGLang's own answer and by version only. Watch mismatch_mean.",
            self._name,
        )
        return None

    def _verify_bytes(self) -> None:
        for name, expected in self._expected.items():
            actual = self._read_back(name)
            if actual is None:
                raise EngineError(f"{name!r} cannot be read back")
            # Rank 0 answers: a part of a sharded tensor, or more than there is (vocabulary and, on a CPU, widths are padded).
            shared = tuple(slice(min(sizes)) for sizes in zip(actual.shape, expected.shape, strict=True))
            if not torch.equal(actual[shared], expected[shared].float()):
                raise EngineError(f"{name!r} reads back differently from what was sent")

    def _verify_log_probs(self, config: DecoderConfig) -> None:
        """Compare with our own decoder on the same weights (Qwen models answer no /get_weights_by_name)."""
        decoder = Decoder(config, {name: tensor.to(self._dtype) for name, tensor in self._expected.items()})
        tokens = torch.randint(config.vocab, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(self._seed))
        ours = token_log_probs(decoder, tokens)[0].numpy()
        difference = float(np.abs(self.probe_log_probs(tokens[0].tolist()) - ours).mean())
        if not difference <= _PROBE_TOLERANCE.get(self._dtype, _PROBE_TOLERANCE_16_BIT):
            self._running.post("/pause_generation", mode="abort")
            raise EngineError(
                f"log-probs of a probe differ by {difference:.3f} nats from those of the weights that were sent"
            )

    def _read_back(self, name: str) -> torch.Tensor | None:
        """The first rows of a parameter as the server holds it, float32; None where the model class cannot tell."""
        response = self._running.send("/get_weights_by_name", name=name, truncate_size=_READ_BACK_ROWS)
        return torch.tensor(response.json()) if response.status_code == HTTPStatus.OK else None

    @property
    def _running(self) -> SglangServer:
        if self._server is None:
            raise EngineError(f"{self._name}: {self._refusal()}")
        return self._server

    def _refusal(self) -> str:
        if self._server is None:
            return "not started (or closed)"
        return "a weight update began and has not been committed; push the weights again"


@contextmanager
def _shared(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Tensors in shared memory, as SGLang's MultiprocessingSerializer writes them; they live until the block ends."""
    buffer = io.BytesIO()
    with _file_system_sharing():
        held = [(name, tensor.detach().to("cpu", copy=True).share_memory_()) for name, tensor in tensors.items()]
        ForkingPickler(buffer).dump(held)
    yield base64.b64encode(buffer.getvalue()).decode()  # meanwhile this frame keeps ``held`` alive


@contextmanager
def _file_system_sharing() -> Iterator[None]:
    """Share by file: the default (descriptors passed over a socket) ends the server when its sender is gone.

    The setting is the process's, and engines of one pool load buckets in threads: one at a time.
    """
    with _SHARING:
        strategy = torch_multiprocessing.get_sharing_strategy()
        torch_multiprocessing.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch_multiprocessing.set_sharing_strategy(strategy)
