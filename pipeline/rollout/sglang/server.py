"""Launch and supervise one real SGLang server on this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
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

logger = logging.getLogger(__name__)

_GUARD = Path(__file__).with_name("guard.py")
_PORT_ATTEMPTS = 3
_CLOSE_TIMEOUT_S = 30.0
_CLASH = "address already in use"


class SglangServer:
    """A server process on 127.0.0.1, its log, and its end.

    The server runs under ``sglang_guard``: it and all its children end when ``close`` is called or this process dies.
    """

    def __init__(
        self, config: RolloutConfig, hf_path: Path, *, dtype: str, seed: int, log_path: Path, load_weights: bool = True
    ) -> None:
        """``load_weights``: read the folder's; False: begin with random ones."""
        self.log_path = log_path
        self.url = ""
        self._config = config
        self._hf_path = hf_path
        self._dtype = dtype
        self._seed = seed
        self._load_weights = load_weights
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0  # where in the log this start's output begins

    def start(self) -> None:
        """Launch, and wait until the server answers. Raises ``EngineError`` with the end of its log."""
        for _ in range(_PORT_ATTEMPTS):
            self._launch(free_port())
            if self._wait_until_healthy():
                return
            reason = self.log_tail()
            self.close()
            # Another process may take the port between free_port() and the server's bind.
            if _CLASH not in reason.lower():
                break
        raise EngineError(
            f"SGLang server for {self._hf_path} did not come up within {self._config.sglang.startup_timeout_s:g} s "
            f"(rollout.sglang.startup_timeout_s); end of {self.log_path}:\n{reason}"
        )

    @property
    def alive(self) -> bool:
        """Whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def post(self, path: str, *, timeout_s: float | None = None, **body: object) -> Any:
        """POST ``body`` as JSON; the decoded reply. Raises ``EngineError`` when there is none or it is not 200.

        ``timeout_s`` is ``rollout.sglang.request_timeout_s`` unless given; after that, ``EngineTimeoutError``.
        """
        return self.check(self._request("POST", path, body, timeout_s))

    def content(self, path: str, **body: object) -> bytes:
        """As ``post``, the body of the reply as it came."""
        response = self._request("POST", path, body)
        self._require_ok(response)
        return response.content

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """GET; the decoded reply. Raises like ``post``."""
        return self.check(self._request("GET", path, timeout_s=timeout_s))

    def send(self, path: str, *, timeout_s: float | None = None, **body: object) -> httpx.Response:
        """POST ``body`` as JSON; the reply, whatever its status. Raises ``EngineError`` when there is none."""
        return self._request("POST", path, body, timeout_s)

    def check(self, response: httpx.Response) -> Any:
        """The decoded body of a reply, which must have status 200."""
        self._require_ok(response)
        return response.json() if "json" in response.headers.get("content-type", "") else response.text

    def _require_ok(self, response: httpx.Response) -> None:
        if response.status_code != HTTPStatus.OK:
            raise EngineError(
                f"{response.url} answered {response.status_code}: {response.text[:500]}; log: {self.log_path}"
            )

    def answers(self, path: str, timeout_s: float) -> bool:
        """Whether a GET of ``path`` is answered with 200."""
        try:
            return _http("GET", self.url + path, None, timeout_s).status_code == HTTPStatus.OK
        except httpx.HTTPError:
            return False

    def log_tail(self, lines: int = 25) -> str:
        """The last lines that the server wrote since its latest start."""
        if not self.log_path.is_file():
            return ""
        written = self.log_path.read_bytes()[self._log_offset :]
        return "\n".join(written.decode(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End the server and its children, and wait for that. Idempotent."""
        if self._process is None:
            return
        self._process.terminate()  # the guard's SIGTERM handler kills the group and cleans up
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the guard of %s (pid %d) did not end within %g s and is killed; the server dies with it",
                self.url,
                self._process.pid,
                _CLOSE_TIMEOUT_S,
            )
            self._process.kill()
            self._process.wait()
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
            *("--skip-tokenizer-init", "--log-level", "warning"),
            *(() if self._load_weights else ("--load-format", "dummy")),
            *(("--max-total-tokens", str(settings.max_total_tokens)) if settings.max_total_tokens else ()),
            *(("--attention-backend", backend) if backend else ()),
            *(sglang_cpu.ARGUMENTS if on_cpu else ()),
            *(("--enable-memory-saver",) if config.placement == "colocated" and not on_cpu else ()),
            *settings.extra_args,
        ]

    def _launch(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # Short, because sockets live there and a socket's path holds at most 107 characters.
        scratch = tempfile.mkdtemp(prefix="sgl-", dir="/tmp")
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if not torch.cuda.is_available():
            environment |= sglang_cpu.environment(self._config.tensor_parallel_size)
        with self.log_path.open("ab") as log:  # a resumed or revived run keeps the log of what ended before
            log.write(f"--- server starts at {self.url}, {datetime.now():%Y-%m-%d %H:%M:%S} ---\n".encode())
            self._log_offset = log.tell()
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(os.getpid()), scratch, *self.command(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal goes to the run, which closes its engines
                env=environment,
            )

    def _wait_until_healthy(self) -> bool:
        deadline = time.monotonic() + self._config.sglang.startup_timeout_s
        while self.alive and time.monotonic() < deadline:
            if self.answers("/health", timeout_s=5):
                return True
            time.sleep(0.25)
        return False

    def _request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_s: float | None = None
    ) -> httpx.Response:
        remedy = ""
        if timeout_s is None:
            timeout_s = self._config.sglang.request_timeout_s
            remedy = "; if the server is merely slow, raise rollout.sglang.request_timeout_s"
        try:
            return _http(method, self.url + path, body, timeout_s)
        except httpx.TimeoutException as error:
            raise EngineTimeoutError(
                f"{self.url}{path}: no answer within {timeout_s:.3g} s{remedy}; log: {self.log_path}"
            ) from error
        except httpx.HTTPError as error:
            if self.alive:
                raise EngineError(
                    f"{self.url}{path}: the server runs but does not answer: {error}; log: {self.log_path}"
                ) from error
            raise EngineError(
                f"{self.url}{path}: the server has ended; end of {self.log_path}:\n{self.log_tail()}"
            ) from error


def _http(method: str, url: str, body: Mapping[str, object] | None, timeout_s: float) -> httpx.Response:
    return http_client.client(proxies=False).request(method, url, json=body, timeout=timeout_s)
