"""Tells whether an SGLang server that owes answers still works on them.

A generate call has no deadline: how long answers queue in a server depends on their number and length. Silence has a
limit instead. SGLang's ``/health`` answers after the scheduler's next batch (sglang/srt/entrypoints/http_server.py);
``/v1/loads`` reads the scheduler's figures from shared memory (sglang/srt/managers/load_snapshot.py), so a look costs
the server nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.server import SglangServer

_LONGEST_INTERVAL_S = 10.0


class Liveness:
    """Looks at a server again and again, and adds up for how long it has been silent.

    Silent is a server that does not answer, or one that has requests to run while none of its figures changes.
    """

    def __init__(self, server: SglangServer, limit_s: float, serving: Callable[[], bool]) -> None:
        """``limit_s``: longest silence. ``serving()``: False while the server is paused, when it generates nothing."""
        self._server, self._limit_s, self._serving = server, limit_s, serving
        self.interval_s = min(limit_s / 10, _LONGEST_INTERVAL_S)
        self._probe_s = limit_s / 5
        self._looked = time.monotonic()
        self._silent_s = 0.0
        self._figures: list[dict[str, Any]] = []

    def look(self) -> str:
        """Look once. Returns why the server is taken for dead, "" as long as it is not."""
        if not self._server.alive:
            return "the server process ended"
        serving = self._serving()
        missing = self._missing(serving)
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        if not missing or self._serving() != serving:
            self._silent_s = 0.0
            return ""
        # No look takes longer, unless the whole job was suspended, and that is not the server's silence.
        self._silent_s += min(passed, self.interval_s + 2 * self._probe_s)
        if self._silent_s < self._limit_s:
            return ""
        return (
            f"the server {missing} for {self._silent_s:.3g} s; if it is merely slow, raise "
            f"rollout.sglang.liveness_timeout_s ({self._limit_s:g})"
        )

    def _missing(self, serving: bool) -> str:
        """What the server fails to do now, "" where it works."""
        path = "/health" if serving else "/model_info"  # /health generates a token, which a paused server does not
        if not self._server.answers(path, self._probe_s):
            return f"has not answered {path}"
        if not serving:
            return ""
        try:
            loads = self._server.get("/v1/loads", timeout_s=self._probe_s)["loads"]
        except EngineError:
            return "has not answered /v1/loads"
        figures = [{name: value for name, value in load.items() if name != "timestamp"} for load in loads]
        moved, self._figures = figures != self._figures, figures
        waiting = any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
        return "" if moved or not waiting else "has answered, but has generated nothing for its requests"
