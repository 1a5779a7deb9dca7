"""The process group by which weights move, and the place where its processes meet before each update.

The group is made from torch's backend class (gloo, or NCCL between GPUs). Torch's own registry of groups belongs to
Megatron in a learner's process and to SGLang in a server's, and stays theirs; two processes of a plan may even be
threads of one program. Nobody can wait in a circle: all processes meet first, each says which plan it made or why it
cannot take part, and only when all have said the same do they form the one group.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from pipeline.reshard.order import Order

_GRACE_S = 10.0  # what NCCL's own watchdog, which ends the process, gets above our deadline
_POLL_S = 0.0005


class LinkError(RuntimeError):
    """A process does not take part in an update, or was lost in the middle of it; the message says which and why."""


class Link:
    """One process's side of the group; kept from update to update, as long as orders name the same generation."""

    def __init__(self, order: Order, process: int, device: torch.device) -> None:
        """Reach the store. ``device``: where messages lie. Raises ``LinkError``."""
        self.key = (order.store, order.generation)
        self._process, self._device = process, device
        self._world = order.inputs.placement.world_size
        host, port = order.store
        try:
            self._store = TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=order.timeout_s)
            )
        except RuntimeError as error:
            raise LinkError(f"the store at {host}:{port}, where all processes meet, does not answer") from error
        self._group: Any = None
        self._end = 0.0
        self._learners = order.inputs.placement.learners
        self._keys: list[str] = []  # of the last meeting
        self._old: list[str] = []  # of the one before, at which nobody looks any more

    def meet(self, order: Order, word: str) -> None:
        """Wait until every process has come to the update; all must say the same ``word``.

        Raises ``LinkError`` that names the processes which did not come, or said another word.
        """
        limit = timedelta(seconds=order.timeout_s)
        self._end = time.monotonic() + order.timeout_s
        keys = [_key(order, process) for process in range(self._world)]
        self._store.set_timeout(limit)
        try:
            self._store.set(keys[self._process], word)
            said = [word.decode() for word in self._store.multi_get(keys)]  # waits for all
        except RuntimeError as error:
            missing = [process for process, key in enumerate(keys) if not self._store.check([key])]
            raise LinkError(f"{_named(missing, order)} did not come within {order.timeout_s:g} s") from error
        for process, other in enumerate(said):
            if other != word:
                raise LinkError(f"{_named([process], order)}: {other}; {_named([self._process], order)}: {word}")
        self._old, self._keys = self._keys, keys
        if self._group is None:
            self._group = self._formed(order, limit)

    def tidy(self) -> None:
        """Take this learner rank's share of the words said before the last meeting from the store."""
        for key in self._old[self._process :: self._learners]:
            self._store.delete_key(key)
        self._old = []

    def exchange(self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Send and receive flat buffers, all at the same time. Raises ``LinkError`` when a process is lost or late."""
        if not sends and not receives:
            return
        try:
            if self._device.type == "cuda":
                self._exchange_nccl(sends, receives)
                return
            works = [self._group.recv([buffer], peer, 0) for peer, buffer in receives]
            works += [self._group.send([buffer], peer, 0) for peer, buffer in sends]
            for work in works:
                work.wait(timedelta(seconds=max(self._end - time.monotonic(), 0.001)))
        except RuntimeError as error:
            peers = sorted({peer for peer, _ in (*sends, *receives)})
            raise LinkError(f"lost in the middle of an exchange with processes {peers}: {error}") from error

    def close(self) -> None:
        """Leave the group; whoever still waits for this process hears of it."""
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def _exchange_nccl(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        self._group._start_coalescing()
        for peer, buffer in receives:
            self._group.recv([buffer], peer, 0)
        for peer, buffer in sends:
            self._group.send([buffer], peer, 0)
        work = self._group._end_coalescing()
        while not work.is_completed():
            if time.monotonic() > self._end:
                raise LinkError("the time is over")
            time.sleep(_POLL_S)
        work.wait()

    def _formed(self, order: Order, limit: timedelta) -> Any:
        keys = PrefixStore(f"weights-{order.generation}", self._store)
        if self._device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = limit + timedelta(seconds=_GRACE_S)
            group: Any = ProcessGroupNCCL(keys, self._process, self._world, options)
            group.barrier().wait()  # NCCL sets its communicator up in the first call that all processes make
            return group
        gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's types
        gloo._devices = [ProcessGroupGloo.create_device(hostname=_own_address(order.store[0]))]
        gloo._timeout = limit
        try:
            return ProcessGroupGloo(keys, self._process, self._world, gloo)
        except RuntimeError as error:
            raise LinkError(f"the process group was not formed: {error}") from error


def refuse(order: Order, processes: Sequence[int], why: str) -> None:
    """Say in place of ``processes`` that they will not come, so that nobody waits for them. Never raises."""
    host, port = order.store
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_GRACE_S))
        for process in processes:
            store.set(_key(order, process), why)
    except RuntimeError:
        return  # the store's owner is gone, and whoever waits at it knows


def _key(order: Order, process: int) -> str:
    return f"update-{order.number}/{process}"


def _named(processes: Sequence[int], order: Order) -> str:
    learners = order.inputs.placement.learners
    names = [
        f"learner rank {process}" if process < learners else f"engine rank {process - learners}"
        for process in processes
    ]
    return ", ".join(names)


def _own_address(host: str) -> str:
    """The address of this machine by which ``host`` can reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing
        return probe.getsockname()[0]
