"""Sends weights to an SGLang server by broadcast in a process group of this process and the server's ranks."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from pipeline.rollout.engine import EngineError, EngineTimeoutError
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.sglang.session import ServerSession
from pipeline.rollout.transport import Deadline
from pipeline.types import WeightBucket

T = TypeVar("T")
_Group = Any  # ProcessGroupGloo, or ProcessGroupNCCL, which only builds with CUDA have

_HOST = "127.0.0.1"  # servers run on this machine
_GRACE_S = 5.0  # what torch gets above a deadline, so that the deadline speaks first
_EXPLAIN_S = 2.0  # for the server's own words, when a broadcast fails
_NUMBERS = itertools.count()


class DistributedTransport:
    """``WeightTransport`` by /init_weights_update_group and /update_weights_from_distributed.

    One group per engine: rank 0 is this process, the server's tensor-parallel ranks follow. The server joins in a
    thread while rank 0 opens the group and waits. Since every rank but ours is in one group only, and each group has a
    port and a name of its own, engines cannot wait for one another in a circle, in whatever order they are started or
    revived. Every rank receives every byte of the model, SGLang's API broadcasts full tensors: the minimum is its
    slices.

    gloo, unless this process sees a GPU beyond the server's: NCCL refuses two ranks on one GPU. A group in which a
    broadcast failed is never used again; the next ``begin`` forms a new one.
    """

    def __init__(self, server: SglangServer, ranks: int) -> None:
        """``ranks``: the server's tensor-parallel size.

        It computes on the first so many GPUs that this process sees.
        """
        self._server = server
        self._ranks = ranks
        self._device = torch.device("cuda", ranks) if torch.cuda.device_count() > ranks else torch.device("cpu")
        self._group: _Group | None = None
        self._name = ""
        self.session = ServerSession(server)
        self._version = 0
        self._flushed = False  # the KV cache of the old weights, in this update

    def connect(self, deadline: Deadline) -> None:
        """Form the group. Raises when the server does not join it in time."""
        self._name = f"isentrope-{os.getpid()}-{next(_NUMBERS)}"
        # Port 0: the store finds a free one, and listens before the server hears of it.
        limit = timedelta(seconds=deadline.remaining_s() + _GRACE_S)
        store = TCPStore(_HOST, 0, self._ranks + 1, is_master=True, timeout=limit, wait_for_workers=False)
        joined = _in_thread(
            lambda: self._server.post(
                "/init_weights_update_group",
                master_address=_HOST,
                master_port=store.port,
                rank_offset=1,
                world_size=self._ranks + 1,
                group_name=self._name,
                backend="gloo" if self._device.type == "cpu" else "nccl",
                timeout_s=deadline.remaining_s(),
            )
        )
        formed = _in_thread(lambda: self._form(store, limit))
        _both("the process group was not formed", joined, formed, deadline)
        self._group = formed.result()

    def begin(self, version: int, deadline: Deadline) -> None:
        """Open the server's update session; form the group anew if an update broke it."""
        if self._group is None:
            self.connect(deadline)
        self.session.begin(deadline)
        self._version, self._flushed = version, False

    def send(self, bucket: WeightBucket, deadline: Deadline) -> None:
        """Broadcast the bucket's tensors in its order. The first also empties the KV cache; paused, it stays empty."""
        group, self._group = self._group, None  # broken unless all goes well
        tensors = [tensor.detach().to(self._device).contiguous() for tensor in bucket.tensors.values()]
        received = _in_thread(
            lambda: self._server.post(
                "/update_weights_from_distributed",
                names=list(bucket.tensors),
                dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                shapes=[list(tensor.shape) for tensor in tensors],
                group_name=self._name,
                flush_cache=not self._flushed,
                weight_version=str(self._version),
                timeout_s=deadline.remaining_s(),
            )
        )
        sent = _in_thread(lambda: _broadcast(group, tensors, timedelta(seconds=deadline.remaining_s() + _GRACE_S)))
        _both("the broadcast failed", received, sent, deadline)
        self._group, self._flushed = group, True

    def verify(self, deadline: Deadline) -> None:
        """Let the server finish loading."""
        self.session.end(deadline)

    def commit(self) -> None:
        """The group stays for the next update."""

    def abort(self) -> None:
        """The server's session stays open, and a broken group is gone already; the next ``begin`` mends both."""

    def close(self) -> None:
        """Take the group down on both sides."""
        if self._group is not None:
            with suppress(EngineError):  # a server that has ended has left the group
                self._server.post("/destroy_weights_update_group", group_name=self._name, timeout_s=_GRACE_S)
        self._group = None

    def _form(self, store: TCPStore, limit: timedelta) -> _Group:
        """Rank 0 of the group; returns when all ranks have met.

        The prefixes are those under which torch's ``init_process_group`` helper keeps a group's keys when SGLang's
        ``init_custom_process_group`` calls it (sglang/srt/utils/common.py). Made here from the backend's class, the
        group stays out of torch's registry of groups, which is not meant for threads and belongs to the learner in an
        inline run.
        """
        keys = PrefixStore(f"{self._device.type}/", PrefixStore(f"{self._name}/", PrefixStore(self._name, store)))
        if self._device.type == "cpu":
            return ProcessGroupGloo(keys, 0, self._ranks + 1, timeout=limit)
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = limit
        return ProcessGroupNCCL(keys, 0, self._ranks + 1, options)


def _broadcast(group: _Group, tensors: Sequence[torch.Tensor], limit: timedelta) -> None:
    """From rank 0 to all; all broadcasts are under way before the first is waited for."""
    options = BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, limit
    works = [group.broadcast([tensor], options) for tensor in tensors]
    for work in works:
        work.wait(limit)


def _in_thread(action: Callable[[], T]) -> Future[T]:
    """Run in a daemon thread: one that hangs in torch or a socket holds up neither us nor the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except (EngineError, RuntimeError, OSError, ValueError) as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight transport", daemon=True).start()
    return future


def _both(failure: str, server: Future[Any], ours: Future[Any], deadline: Deadline) -> None:
    """Wait for the server's part and ours; when one fails, the other would wait for ever.

    Raises the server's error, which says more, if there is one soon after ours.
    """
    done, _ = wait((server, ours), timeout=deadline.remaining_s(), return_when=FIRST_EXCEPTION)
    if not done:
        raise EngineTimeoutError(f"{failure}: the server takes no part")
    if ours in done and ours.exception() is not None:
        wait((server,), timeout=_EXPLAIN_S)
    for future in (server, ours):
        if future.done() and (error := future.exception()) is not None:
            raise error if isinstance(error, EngineError) else EngineError(f"{failure}: {error}") from error
    if not (server.done() and ours.done()):
        raise EngineTimeoutError(f"{failure}: {'the server' if ours.done() else 'this side'} takes too long")
