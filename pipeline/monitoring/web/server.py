"""The HTTP server of the web page: static files, JSON documents, and one stream of changes.

Nothing is fetched from elsewhere.

    GET /                     the page; static/... are its parts
    GET /api/runs             {"runs": [RunView.status(), ...]}, each with its "title" among them,
                              in the order of the command line
    GET /api/series           ?run=0[&names=reward/mean,...][&spread=entropy/mean,...][&first=0][&last=99]
                              [&points=1000]: RunView.read()
    GET /api/marks            ?run=0: {"marks": RunView.marks()}
    GET /api/law              ?run=0[&first=0][&last=99]: RunView.law()
    GET /api/timeline         ?run=0[&first=0][&last=99]: {"steps": RunView.timeline()}
    GET /api/samples          ?run=0[&before=step][&text=...][&role=main]: samples.list_samples()
    GET /api/sample           ?run=0&step=3&index=0: samples.read_sample()
    GET /api/events           server-sent events: {"run": 0, "status": RunView.status()} whenever a run's log grew

At most ``CONNECTIONS`` are open at a time: for one more, that which has kept still the longest is hung up, so that
silent ones shut nobody out. A bad query gets 400 and ``{"error": ...}``, an unknown path 404. With a token, the first
request must carry it (``?token=``, as in the printed address); it is then kept in a cookie. Without one, only requests
addressed to this machine are answered, so that no page from elsewhere can read the runs under a name of its own that
resolves to 127.0.0.1.
"""

from __future__ import annotations

import gzip
import hmac
import json
import logging
import mimetypes
import re
import secrets
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pipeline.config.errors import ConfigError
from pipeline.monitoring.events import EventLogError
from pipeline.monitoring.naming import titles
from pipeline.monitoring.web.samples import Query, list_samples, read_sample
from pipeline.monitoring.web.view import RunView

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
LOCAL = ("127.0.0.1", "localhost")
POLL_S = 1.0
KEEP_ALIVE_S = 15.0  # between comments on a quiet stream: a browser that left is noticed then
MAX_POINTS = 5000
CONNECTIONS = 128  # at a time: each takes a thread and a file, of which some logins allow 256
REQUEST_S = 10  # that a connection may keep still before and within a request
SMALL = 1024  # bytes not worth compressing
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page of some runs until ``shutdown``; a context manager.

    Raises ``ConfigError`` when nothing can listen at ``host`` and ``port`` (0: any free port).
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[RunView], host: str, port: int, *, with_token: bool = False) -> None:
        self.runs = runs
        self.token = secrets.token_urlsafe(24) if with_token or host not in LOCAL else ""
        self._changes = [0] * len(runs)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._connections: dict[socket.socket, bool] = {}  # those open, oldest first: whether one waits for a request
        self._counting = threading.Lock()
        try:
            super().__init__((host, port), _Request)
        except OSError as error:
            remedy = "give another --port (0: any that is free), or another --host, an address of this machine"
            raise ConfigError("--port", port, f"cannot listen on {host}:{port}: {error.strerror}", remedy) from error
        self._follower = threading.Thread(target=self._follow, name="follow runs", daemon=True)
        self._follower.start()

    @property
    def url(self) -> str:
        """The address to open, with the token if there is one."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/" + (f"?token={self.token}" if self.token else "")

    def server_bind(self) -> None:
        """Bind, without the look-up of this machine's name that ``HTTPServer`` makes: offline it can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def server_close(self) -> None:
        """Stop following and listening."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        super().server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, where there is room for it."""
        with self._counting:
            if len(self._connections) >= CONNECTIONS:
                silent = next((other for other, waits in self._connections.items() if waits), request)
                with suppress(OSError):
                    silent.shutdown(socket.SHUT_RDWR)  # its thread sees the end of it, and closes it
                self._connections.pop(silent, None)
            self._connections[request] = True
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._counting:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    @contextmanager
    def answering(self, request: socket.socket) -> Iterator[None]:
        """Within, a connection is at work and not hung up."""
        with self._counting:
            self._connections.pop(request, None)
            self._connections[request] = False
        try:
            yield
        finally:
            with self._counting:
                if self._connections.pop(request, None) is not None:
                    self._connections[request] = True  # the last that kept still

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news; of anything else one line is logged, its traceback when debugging."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            log.error("request of %s failed: %s: %s", client_address, type(error).__name__, error)
            log.debug("traceback", exc_info=error)

    def changes_since(self, seen: Sequence[int]) -> list[int] | None:
        """Change counters of the runs once they differ from ``seen``, or after a while; None when the server closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != list(seen) or self._closing.is_set(), KEEP_ALIVE_S)
            return None if self._closing.is_set() else list(self._changes)

    def _follow(self) -> None:
        """Read what the runs append, for all viewers at once."""
        while not self._closing.wait(POLL_S):
            for index, run in enumerate(self.runs):
                try:
                    changed = run.update()
                except (EventLogError, OSError) as error:
                    log.warning("%s: %s", run.run_dir, error)
                    continue
                if changed:
                    with self._changed:
                        self._changes[index] += 1
                        self._changed.notify_all()


def serve(run_dirs: Sequence[Path], host: str, port: int, *, with_token: bool, announce: Callable[[str], None]) -> None:
    """Serve the page of runs until ctrl-C; ``announce`` is told the address once it answers.

    Errors as ``RunView`` and ``PageServer``.
    """
    with PageServer([RunView(run_dir) for run_dir in run_dirs], host, port, with_token=with_token) as server:
        announce(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class _BadQueryError(ValueError):
    """What is wrong with a request, for its sender."""


class _Request(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_S

    def do_GET(self) -> None:  # the name http.server asks for
        """Answer what can be understood."""
        with self.server.answering(self.connection):
            try:
                url = urlsplit(self.path)
            except ValueError as error:
                self._send(400, f"This is no address: {error}.\n".encode(), "text/plain; charset=utf-8")
                return
            self._answer(url.path, dict(parse_qsl(url.query)))

    def _answer(self, path: str, query: Mapping[str, str]) -> None:
        """Check who asks, then answer."""
        if self.server.token and "token" in query and self._is_token(query["token"]):
            cookie = f"{self._cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            self._send(303, b"", "text/plain", {"Location": ".", "Set-Cookie": cookie})
        elif refusal := self._refusal(query):
            self._send(refusal[0], refusal[1].encode(), "text/plain; charset=utf-8")
        elif path == "/api/events":
            self._stream()
        elif answer := _DOCUMENTS.get(path):
            self._document(answer, query)
        else:
            self._static(path)

    def log_message(self, format: str, *values: Any) -> None:
        """Requests are nobody's news, except when debugging."""
        log.debug(format, *values)

    @property
    def _cookie(self) -> str:
        return f"isentrope-{self.server.server_port}"  # cookies do not tell ports apart

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.server.token.encode())

    def _kept(self) -> list[str]:
        """The values that the browser keeps under this page's cookie; others' cookies may hold anything."""
        pairs = ";".join(self.headers.get_all("Cookie", [])).split(";")
        named = (pair.strip().partition("=") for pair in pairs)
        return [value.strip('"') for name, _, value in named if name == self._cookie]

    def _refusal(self, query: Mapping[str, str]) -> tuple[int, str] | None:
        if not self.server.token:
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            return None if host in LOCAL else (403, f"Open this page as {self.server.url}\n")
        kept = self._kept()
        if "token" not in query and not kept:
            return 401, "This page needs its token: open the address that `isentrope monitor` printed.\n"
        if "token" in query or not any(map(self._is_token, kept)):
            return 403, "This is not the token of this page: open the address that `isentrope monitor` printed last.\n"
        return None

    def _document(self, answer: Callable[[PageServer, Mapping[str, str]], Any], query: Mapping[str, str]) -> None:
        status = 200
        try:
            document = answer(self.server, query)
        except _BadQueryError as error:
            status, document = 400, {"error": str(error)}
        except OSError as error:  # the run's folder went away
            status, document = 500, {"error": str(error)}
        body = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")
        self._send(status, body, "application/json")

    def _static(self, path: str) -> None:
        file = _FILES.get(path)
        if file is None:
            self._send(404, b"There is nothing here.\n", "text/plain")
            return
        kind = mimetypes.guess_type(file.name)[0] or "text/plain"
        self._send(200, file.read_bytes(), f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)

    def _send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        compress = len(body) > SMALL and "gzip" in self.headers.get("Accept-Encoding", "")
        if compress:
            body = gzip.compress(body, compresslevel=1)
        self.send_response(status)
        sent = {**HEADERS, **(headers or {}), "Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (sent | ({"Content-Encoding": "gzip"} if compress else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        """Server-sent events until the browser or the server leaves: first every run, then each that changed."""
        self.close_connection = True  # the answer's end is the connection's
        self.send_response(200)
        for name, value in {**HEADERS, "Content-Type": "text/event-stream", "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        seen = [-1] * len(self.server.runs)
        while (counts := self.server.changes_since(seen)) is not None:
            lines = [": nothing new\n\n"]
            for index, run in enumerate(self.server.runs):
                if counts[index] != seen[index]:
                    lines.append(f"data: {json.dumps({'run': index, 'status': run.status()}, allow_nan=False)}\n\n")
            self.wfile.write("".join(lines).encode())
            seen = counts


# What is served as it is, by path.
_FILES = {f"/static/{file.relative_to(STATIC).as_posix()}": file for file in STATIC.rglob("*") if file.is_file()}
_FILES["/"] = STATIC / "index.html"


def _runs(server: PageServer, query: Mapping[str, str]) -> Any:
    found = [run.status() for run in server.runs]
    named = titles([(status["name"], status["seed"], Path(status["run"])) for status in found])
    return {"runs": [status | {"title": title} for status, title in zip(found, named, strict=True)]}


def _series(server: PageServer, query: Mapping[str, str]) -> Any:
    names, spread = ([name for name in query.get(key, "").split(",") if name] for key in ("names", "spread"))
    points = _number(query, "points", 1000)
    if not names + spread or not 1 <= points <= MAX_POINTS:
        raise _BadQueryError(f"give names=...,... or spread=...,... and points between 1 and {MAX_POINTS}")
    return _run(server, query).read(names, spread, *_range(query), points)


def _marks(server: PageServer, query: Mapping[str, str]) -> Any:
    return {"marks": _run(server, query).marks()}


def _law(server: PageServer, query: Mapping[str, str]) -> Any:
    return _run(server, query).law(*_range(query))


def _timeline(server: PageServer, query: Mapping[str, str]) -> Any:
    return {"steps": _run(server, query).timeline(*_range(query))}


def _samples(server: PageServer, query: Mapping[str, str]) -> Any:
    before = _number(query, "before", sys.maxsize)
    asked = Query(before, query.get("text", ""), query.get("role", ""))
    return list_samples(_run(server, query).run_dir, asked)


def _sample(server: PageServer, query: Mapping[str, str]) -> Any:
    step, index = _number(query, "step"), _number(query, "index")
    found = read_sample(_run(server, query).run_dir, step, index)
    if found is None:
        raise _BadQueryError(f"there is no sample {index} of step {step}")
    return found


_DOCUMENTS: dict[str, Callable[[PageServer, Mapping[str, str]], Any]] = {
    "/api/runs": _runs,
    "/api/series": _series,
    "/api/marks": _marks,
    "/api/law": _law,
    "/api/timeline": _timeline,
    "/api/samples": _samples,
    "/api/sample": _sample,
}


def _run(server: PageServer, query: Mapping[str, str]) -> RunView:
    index = _number(query, "run")
    if not 0 <= index < len(server.runs):
        raise _BadQueryError(f"run={index}: there are runs 0 to {len(server.runs) - 1}")
    return server.runs[index]


def _range(query: Mapping[str, str]) -> tuple[int, int | None]:
    return _number(query, "first", 0), _number(query, "last") if "last" in query else None


def _number(query: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = str(query.get(name, default))
    if not re.fullmatch("[0-9]{1,19}", value):
        raise _BadQueryError(f"{name}={value}: give a whole number")
    return min(int(value), sys.maxsize)
