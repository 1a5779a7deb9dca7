"""Opens and closes SGLang's session of weight updates in memory."""

from __future__ import annotations

from http import HTTPStatus

from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.transport import Deadline


class ServerSession:
    """POST /begin_weight_update ... /end_weight_update: in 0.5.21+ tensors are taken only in between.

    It unpacks weights that the server keeps in another form (quantised in place) and packs them again. Releases before
    answer 404, and need none.
    """

    def __init__(self, server: SglangServer) -> None:
        self._server = server
        self._open = False
        self.supported = True  # until the first update says otherwise

    def begin(self, deadline: Deadline) -> None:
        """Open it; one that a failed update left open is ended first."""
        self.end(deadline)
        if not self.supported:
            return
        response = self._server.send("/begin_weight_update", selector="all", timeout_s=deadline.remaining_s())
        if response.status_code == HTTPStatus.NOT_FOUND:
            self.supported = False
            return
        self._server.check(response)
        self._open = True

    def end(self, deadline: Deadline) -> None:
        """Close it, if it is open."""
        if self._open:
            self._server.post("/end_weight_update", timeout_s=deadline.remaining_s())
            self._open = False
