"""Launch and supervise one real SGLang server on this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import torch

from pipeline import http_client
from pipeline.config.schema import RolloutConfig
from pipeline.ports import free_port
from pipeline.rollout.engine import EngineError, EngineTimeoutError
from pipeline.rollout.sglang import cpu as sglang_cpu
from pipeline.rollout.sglang.receiver import LOADER
from pipeline.rollout.sglang.startup import READ_BYTES_PER_S, startup_limit_s, weight_bytes

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[3]
_GUARD = Path(__file__).with_name("guard.py")
_PORT_ATTEMPTS = 3
_CLOSE_TIMEOUT_S = 30.0
_TAIL_LINES = 25
_CLASH = "address already in use"


class SglangServer:
    """A server process on 127.0.0.1, its log, and its end.

    The server runs under ``sglang_guard``: it and all its children end when ``close`` is called or this process dies.
    """

    def __init__(
        self,
        config: RolloutConfig,
        hf_path: Path,
        *,
        dtype: str,
        seed: int,
        log_path: Path,
        load_weights: bool = True,
        record_routes: bool = False,
        reads_text: bool = False,
    ) -> None:
        """``load_weights``: read the folder's; False: begin with random ones. ``record_routes``: be able to say which
        experts read each token. ``reads_text``: be able to find stop texts.
        """
        self.log_path = log_path
        self.url = ""
        self._config = config
        self._hf_path = hf_path
        self._dtype = dtype
        self._seed = seed
        self._load_weights = load_weights
        self._record_routes = record_routes
        self._reads_text = reads_text
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Lock()
        self._log_offset = 0  # where in the log this start's output begins

    def start(self) -> None:
        """Launch, and wait until the server answers. Raises ``EngineError`` with the end of its log."""
        for _ in range(_PORT_ATTEMPTS):
            self._launch(free_port())
            failure = self._wait_until_healthy()
            if not failure:
                return
            reason = self.log_tail()
            self.close()
            # Another process may take the port between free_port() and the server's bind.
            if _CLASH not in reason.lower():
                break
        raise EngineError(f"SGLang server for {self._hf_path} {failure}; end of {self.log_path}:\n{reason}")

    @property
    def alive(self) -> bool:
        """Whether the server process runs."""
        process = self._process  # another thread may close meanwhile
        return process is not None and process.poll() is None

    def post(self, path: str, *, timeout_s: float | None = None, **body: object) -> Any:
        """POST ``body`` as JSON; the decoded reply. Raises ``EngineError`` when there is none or it is not 200.

        After ``timeout_s``, ``EngineTimeoutError``: ``rollout.sglang.liveness_timeout_s`` unless given.
        """
        return self.check(self._request("POST", path, body, timeout_s))

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """GET; the decoded reply. Raises like ``post``."""
        return self.check(self._request("GET", path, timeout_s=timeout_s))

    def send(self, path: str, *, timeout_s: float | None = None, **body: object) -> httpx.Response:
        """POST ``body`` as JSON; the reply, whatever its status. Raises ``EngineError`` when there is none."""
        return self._request("POST", path, body, timeout_s)

    def check(self, response: httpx.Response) -> Any:
        """The decoded body of a reply, which must have status 200."""
        if response.status_code != HTTPStatus.OK:
            raise self.refused(str(response.url), response.status_code, response.text[:500])
        return response.json() if "json" in response.headers.get("content-type", "") else response.text

    def refused(self, url: str, status: int, said: str) -> EngineError:
        """The error that a reply of another status than 200 is."""
        return EngineError(f"{url} answered {status}: {said}; log: {self.log_path}")

    def lost(self, url: str, reason: object) -> EngineError:
        """The error that a lost connection is."""
        if self.alive:
            return EngineError(f"{url}: the server runs but does not answer: {reason}; log: {self.log_path}")
        return EngineError(f"{url}: the server has ended; end of {self.log_path}:\n{self.log_tail()}")

    def answers(self, path: str, timeout_s: float) -> bool:
        """Whether a GET of ``path`` is answered with 200."""
        try:
            return _http("GET", self.url + path, None, timeout_s).status_code == HTTPStatus.OK
        except httpx.HTTPError:
            return False

    def log_tail(self) -> str:
        """The last lines that the server wrote since its latest start."""
        if not self.log_path.is_file():
            return ""
        written = self.log_path.read_bytes()[self._log_offset :]
        return "\n".join(written.decode(errors="replace").splitlines()[-_TAIL_LINES:])

    def close(self) -> None:
        """End the server and its children, and wait for that. Idempotent."""
        with self._closing:  # who closes as well returns no earlier: what comes next may need the GPUs
            process = self._process
            if process is None:
                return
            process.terminate()  # the guard's SIGTERM handler kills the group and cleans up
            try:
                process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.warning(
                    "the guard of %s (pid %d) did not end within %g s and is killed; the server dies with it",
                    self.url,
                    process.pid,
                    _CLOSE_TIMEOUT_S,
                )
                process.kill()
                process.wait()
            self._process = None

    def command(self, port: int) -> list[str]:
        """The server's command line."""
        config, settings = self._config, self._config.sglang
        on_cpu = not torch.cuda.is_available()
        backend = settings.attention_backend
        if backend == "auto":
            backend = sglang_cpu.ATTENTION_BACKEND if on_cpu else ""
        return [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(self._hf_path)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", self._dtype),
            *("--tensor-parallel-size", str(config.tensor_parallel_size), "--random-seed", str(self._seed % 2**31)),
            *("--mem-fraction-static", str(settings.mem_fraction_static), "--weight-version", "0"),
            *("--log-level", "warning", "--custom-weight-loader", LOADER),
            # The warm-up of a server that reads text sends words, which not every tokenizer knows.
            "--skip-server-warmup" if self._reads_text else "--skip-tokenizer-init",
            *(("--enable-return-routed-experts",) if self._record_routes else ()),
            *(() if self._load_weights else ("--load-format", "dummy")),
            *(("--max-total-tokens", str(settings.max_total_tokens)) if settings.max_total_tokens else ()),
            *(("--attention-backend", backend) if backend else ()),
            *(sglang_cpu.ARGUMENTS if on_cpu else ()),
            *(("--enable-memory-saver",) if config.colocated and not on_cpu else ()),
            *settings.extra_args,
        ]

    def _launch(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # Short, because sockets live there and a socket's path holds at most 107 characters.
        scratch = tempfile.mkdtemp(prefix="sgl-", dir="/tmp")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": _python_path(os.environ.get("PYTHONPATH"))}
        if not torch.cuda.is_available():
            environment |= sglang_cpu.environment(self._config.tensor_parallel_size, environment["PYTHONPATH"])
        with self.log_path.open("ab") as file:  # a resumed or revived run keeps the log of what ended before
            file.write(f"--- server starts at {self.url}, {datetime.now():%Y-%m-%d %H:%M:%S} ---\n".encode())
            self._log_offset = file.tell()
            file.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(os.getpid()), scratch, *self.command(port)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal goes to the run, which closes its engines
                env=environment,
            )

    def _wait_until_healthy(self) -> str:
        """Why the server is not up, "" when it is."""
        limit_s, begun = startup_limit_s(self._config, self._hf_path), time.monotonic()
        while self.alive and time.monotonic() < begun + limit_s:
            if self.answers("/health", timeout_s=5):
                return ""
            time.sleep(0.25)
        if not self.alive:
            return f"ended while it started, after {time.monotonic() - begun:.0f} s"
        return (
            f"runs, but did not answer /health within {limit_s:.3g} s: {self._config.sglang.startup_timeout_s:g} s "
            f"(rollout.sglang.startup_timeout_s; raise it if the server is merely slow) and what reading "
            f"{weight_bytes(self._config, self._hf_path) / 1e9:.3g} GB takes at {READ_BYTES_PER_S / 1e9:g} GB/s"
        )

    def _request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_s: float | None = None
    ) -> httpx.Response:
        remedy = ""
        if timeout_s is None:
            timeout_s = self._config.sglang.liveness_timeout_s
            remedy = "; if the server is merely slow, raise rollout.sglang.liveness_timeout_s"
        try:
            return _http(method, self.url + path, body, timeout_s)
        except httpx.TimeoutException as error:
            raise EngineTimeoutError(
                f"{self.url}{path}: no answer within {timeout_s:.3g} s{remedy}; log: {self.log_path}"
            ) from error
        except httpx.HTTPError as error:
            raise self.lost(self.url + path, error) from error


def _python_path(inherited: str | None) -> str:
    """Where the server's ranks find the function that takes weights."""
    return os.pathsep.join(filter(None, (str(_ROOT), inherited)))


def _http(method: str, url: str, body: Mapping[str, object] | None, timeout_s: float) -> httpx.Response:
    return http_client.client(proxies=False).request(method, url, json=body, timeout=timeout_s)
