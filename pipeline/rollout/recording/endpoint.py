"""Serves recordings to clients of OpenAI's API: HTTP on the loopback, one bearer key for each episode.

Sampling is the run's, but a client may end its answers at texts of its own (``stop``). One that sends a temperature, a
seed or a limit is told once in the log, and at every answer in the header ``Isentrope-Unused``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

from pipeline.data import DataError
from pipeline.rollout.engine import EngineError
from pipeline.rollout.recording import wire
from pipeline.rollout.recording.messages import RequestError
from pipeline.rollout.recording.recording import Completion, Recording

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BODY_BYTES = 16 << 20  # of a request
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class Endpoint:
    """The server: one event loop in one thread, in which all recordings live. Any thread may call.

    An answer is recorded when it was drawn, whether or not its client still listens; a draw whose client went away is
    given up. Streamed answers are sent once they are drawn.
    """

    def __init__(self, model: str) -> None:
        """``model``: the name that clients are told."""
        self._model = model
        self._recordings: dict[str, Recording] = {}  # by key
        self._answers = 0
        self._told: set[str] = set()  # parameters that some client was told of
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recording endpoint", daemon=True)
        self._runner = web.AppRunner(
            self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )

    def start(self) -> str:
        """Listen on a free port of 127.0.0.1; returns the base URL of the API."""
        self._thread.start()
        return self._run(self._listen())

    def open(self, recording: Recording) -> str:
        """Serve an episode; returns its key."""
        key = f"episode-{secrets.token_urlsafe(24)}"
        self._recordings[key] = recording
        return key

    def close_episode(self, key: str) -> None:
        """Serve an episode no longer: its key is unknown from here on."""
        self._recordings.pop(key, None)

    def close(self) -> None:
        """Drop all connections and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._run(self._runner.cleanup())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=_BODY_BYTES, middlewares=[_in_openais_form])
        application.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._complete),
                web.get("/v1/models", self._models),
            ]
        )
        return application

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        recording, body = await self._asked(request)
        stop = wire.read_stop(body.get("stop"))
        completion = await recording.chat(
            body.get("messages"), body.get("tools"), calls=body.get("tool_choice") != "none", stop=stop
        )
        return await self._send(request, recording, body, completion, chat=True)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        recording, body = await self._asked(request)
        stop = wire.read_stop(body.get("stop"))
        completion = await recording.complete(wire.read_prompt(body.get("prompt")), stop=stop)
        return await self._send(request, recording, body, completion, chat=False)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._recording(request)
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "isentrope"}
        return web.json_response({"object": "list", "data": [model]})

    def _recording(self, request: web.Request) -> Recording:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key not in self._recordings:
            raise RequestError("no episode has this key, or it is over", "invalid_api_key", 401)
        return self._recordings[key]

    async def _asked(self, request: web.Request) -> tuple[Recording, dict[str, Any]]:
        """The episode that a request belongs to, and its body."""
        recording = self._recording(request)
        recording.check_size(request.content_length or 0)
        text = await request.read()
        recording.check_size(len(text))
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from error
        wire.check_request(body)
        for name, value in wire.unused(body).items():
            if name not in self._told:
                self._told.add(name)
                log.warning(
                    "a client asks for %s=%.60r, which is not used: sampling and limits are the run's", name, value
                )
        return recording, body

    async def _send(
        self, request: web.Request, recording: Recording, body: dict[str, Any], completion: Completion, *, chat: bool
    ) -> web.StreamResponse:
        self._answers += 1
        asked = body.get("logprobs")  # true or false; in completions a number, of which 0 is one
        told = asked is not None and asked is not False
        texts = recording.pieces(completion.drawn.token_ids) if told else None
        answer = wire.Answer(completion, chat, self._answers, int(time.time()), self._model, texts)
        unused = wire.unused(body)
        headers = {"Isentrope-Unused": ", ".join(sorted(unused))} if unused else {}
        if not body.get("stream"):
            return web.json_response(answer.body(), headers=headers)
        response = web.StreamResponse(
            headers=headers | {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        for piece in answer.pieces(with_usage=bool((body.get("stream_options") or {}).get("include_usage"))):
            await response.write(f"data: {json.dumps(piece)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@web.middleware
async def _in_openais_form(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as OpenAI's clients read them."""
    try:
        return await handler(request)
    except RequestError as error:
        return _failed(str(error), error.code, error.status)
    except DataError as error:
        return _failed(str(error), "invalid_request", 400)
    except EngineError as error:
        return _failed(str(error), "engine_failed", 503)
    except web.HTTPException as error:
        return _failed(
            f"{request.method} {request.path}: {error.reason}", _CODES.get(error.status, "http"), error.status
        )


def _failed(message: str, code: str, status: int) -> web.Response:
    return web.json_response(wire.error(message, code, status), status=status)
