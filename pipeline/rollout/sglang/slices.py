"""Has every rank of an SGLang server take its slices, by the function that runs inside of them (``receiver``)."""

from __future__ import annotations

import base64
import pickle
import shutil
from pathlib import Path

from pipeline.reshard.order import Order, Report
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.receiver import CONTROL, LOADER, Control, read_report
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.sglang.session import ServerSession
from pipeline.rollout.transport import Deadline

_GRACE_S = 5.0  # what the server gets above the ranks' own deadline, so that their words arrive


class SliceTransport:
    """``WeightTransport`` by /update_weights_from_tensor, whose only tensors tell each rank what to do."""

    def __init__(self, server: SglangServer, ranks: int, scratch: Path) -> None:
        """``ranks``: the server's tensor-parallel size. ``scratch``: a folder for the ranks' reports."""
        self._server, self._ranks, self._scratch = server, ranks, scratch
        self.session = ServerSession(server)
        self.reports: list[Report] = []  # of the latest update, by rank

    def begin(self, deadline: Deadline) -> None:
        """Open the server's update session."""
        self.session.begin(deadline)

    def receive(self, order: Order, engine: int, deadline: Deadline) -> None:
        """Tell the ranks, wait until all are through, and read what they report."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        reports = [self._scratch / f"report-{order.number}-{rank}" for rank in range(self._ranks)]
        ranks = order.inputs.engine_ranks(engine)
        controls = [Control(order, rank, str(report)) for rank, report in zip(ranks, reports, strict=True)]
        self._server.post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[_payload(control) for control in controls],
            load_format=LOADER,
            flush_cache=True,
            weight_version=str(order.version),
            timeout_s=deadline.remaining_s() + _GRACE_S,
        )
        try:
            self.reports = [read_report(path) for path in reports]
        except OSError as error:
            raise EngineError(f"a rank left no report of the update ({error}): is the disk full?") from error
        for path in reports:
            path.unlink()
        if errors := {report.error for report in self.reports if report.error}:
            raise EngineError("; ".join(sorted(errors)))

    def verify(self, order: Order, deadline: Deadline) -> None:
        """Let the server finish loading."""
        self.session.end(deadline)

    def commit(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """The server's session stays open; the next ``begin`` ends it."""

    def close(self) -> None:
        """Nothing to take down: the ranks leave their group when the server ends."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def _payload(control: Control) -> str:
    """One rank's, as SGLang reads it: names and tensors, pickled, in base64."""
    return base64.b64encode(pickle.dumps([(CONTROL, control.to_tensor())])).decode()
