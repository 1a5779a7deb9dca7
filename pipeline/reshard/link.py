"""The process groups by which weights move, and the place where an update's members meet before each.

Members are the learner's ranks and the engines' ranks. Groups are made from torch's backend class (gloo, or NCCL
between GPUs). Torch's own registry of groups belongs to Megatron in a learner's process and to SGLang in a server's,
and stays theirs; two members may even be threads of one program. Nobody can wait in a circle: all members meet first,
each says which plan it made or why it cannot take part, and only when all have said the same do they form the group of
the plan's processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from pipeline.ports import own_address
from pipeline.reshard.order import Order

CPU = torch.device("cpu")
_GRACE_S = 10.0  # what NCCL's own watchdog, which ends the process, gets above our deadline
_LATE_S = 2.0  # what the store gets above the deadline, for it names who did not come
_POLL_S = 0.0005

T = TypeVar("T")


class LinkError(RuntimeError):
    """A process does not take part in an update, or was lost in the middle of it; the message says which and why."""


class Group:
    """A process group of torch's backend class; it is left whenever anything fails in it."""

    def __init__(
        self, store: TCPStore, order: Order, name: str, rank: int, world: int, device: torch.device = CPU
    ) -> None:
        """Form it with the others that name it so. ``device``: where messages lie. Raises ``LinkError``."""
        self._end = time.monotonic() + order.timeout_s
        self.name, self._rank, self._device = name, rank, device
        keys = PrefixStore(f"{name}-{order.generation}", store)
        limit = timedelta(seconds=order.timeout_s)
        if device.type == "cuda":
            self._group: Any = _nccl(keys, rank, world, limit)
            return
        gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's types
        gloo._devices = [ProcessGroupGloo.create_device(hostname=own_address(order.store[0]))]
        gloo._timeout = limit
        try:
            self._group = ProcessGroupGloo(keys, rank, world, gloo)
        except RuntimeError as error:
            raise LinkError(f"the process group was not formed: {error}") from error

    def begin(self, end: float) -> None:
        """Let exchanges take until ``end``, a time of ``time.monotonic``."""
        self._end = end

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
        """Leave; whoever still waits for this process hears of it."""
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


class Link:
    """One member's side of updates; kept from one to the next, as long as orders name the same generation.

    ``plan``: the group of the plan's processes; None for an engine rank that shares a learner rank's. ``pair``: the
    group of a learner rank and the engine rank that shares its process, ``handover.LEARNER`` and ``ENGINE``.
    """

    def __init__(self, order: Order, member: int, device: torch.device) -> None:
        """Reach the store. ``device``: where messages lie. Raises ``LinkError``."""
        self.key = (order.store, order.generation)
        self._placement = order.inputs.placement
        self._member, self._device = member, device
        self._store = _reached(order, order.timeout_s)
        self.plan: Any = None  # Group
        self.pair: Any = None  # Group
        self._keys: list[str] = []  # of the last meeting
        self._order: Order | None = None  # of the meeting to come
        self._word, self._end = "", 0.0

    def come(self, order: Order, word: str) -> None:
        """Say ``word``, and go on with what needs nobody else: ``meet`` waits for the others.

        Where there is no group yet it waits at once: who fails before it is in one has no way to tell the others.
        """
        self._order, self._word, self._end = order, word, time.monotonic() + order.timeout_s
        self._store.set_timeout(timedelta(seconds=order.timeout_s))
        self._store.set(_key(order, self._member), word)
        if self.plan is None and self.pair is None:
            self.meet()

    def meet(self) -> None:
        """Wait until every member has come to the update; all must say the same word. At once if they have.

        Raises ``LinkError`` that names the members which did not come, or said another word.
        """
        order, word, self._order = self._order, self._word, None
        if order is None:
            return
        keys = [_key(order, member) for member in range(self._placement.members)]
        said = _answered(order, order.timeout_s, lambda: self._hear(order, keys))
        for member, other in enumerate(said):
            if other != word:
                raise LinkError(f"{_named([member], order)}: {other}; {_named([self._member], order)}: {word}")
        self._keys = keys
        if self.plan is None and self.pair is None:
            self._form(order)
        for group in (self.plan, self.pair):
            if group is not None:
                group.begin(self._end)

    def exchange(self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]) -> None:
        """``Group.exchange`` among the plan's processes, once all members have come."""
        self.meet()
        self.plan.exchange(sends, receives)

    def _hear(self, order: Order, keys: Sequence[str]) -> list[str]:
        """What every member said, once all have.

        A learner rank first takes its share of the last meeting's words from the store; whoever came is through with
        it.
        """
        learners = self._placement.learners
        for key in self._keys[self._member :: learners] if self._member < learners else ():
            self._store.delete_key(key)
        try:
            return [word.decode() for word in self._store.multi_get(list(keys))]  # waits for all
        except RuntimeError as error:
            missing = [member for member, key in enumerate(keys) if not self._store.check([key])]
            raise LinkError(f"{_named(missing, order)} did not come within {order.timeout_s:g} s") from error

    def close(self) -> None:
        """Leave the groups; whoever still waits for this member hears of it."""
        for group in (self.plan, self.pair):
            if group is not None:
                group.close()
        self.plan = self.pair = None

    def _form(self, order: Order) -> None:
        """Learner ranks form theirs first, then each its pair, so nobody waits in a circle."""
        placement, member = self._placement, self._member
        shares = placement.colocated and member >= placement.learners
        if not shares:
            self.plan = Group(self._store, order, "weights", member, placement.world_size, self._device)
        number = member - placement.learners if shares else member
        if placement.colocated and number < placement.engines:
            self.pair = Group(self._store, order, f"pair-{number}", int(shares), 2)


def refuse(order: Order, members: Sequence[int], why: str) -> None:
    """Say in place of ``members`` that they will not come, so that nobody waits for them. Never raises."""
    try:
        store = _reached(order, _GRACE_S)
        for member in members:
            store.set(_key(order, member), why)
    except RuntimeError:
        return  # the store's owner is gone, and whoever waits at it knows


def _reached(order: Order, timeout_s: float) -> TCPStore:
    """A client of the store. Raises ``LinkError``."""
    host, port = order.store
    limit = timedelta(seconds=timeout_s)
    return _answered(
        order, timeout_s, lambda: TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    )


def _answered(order: Order, timeout_s: float, ask: Callable[[], T]) -> T:
    """What ``ask`` returns of the store. Raises ``LinkError`` when it fails or does not return in time.

    A client's own timeout (torch 2.13) does not hold where the process that keeps the store is stopped, or another
    listens at its port: then a thread is left waiting, not its caller.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    try:
        return answer.result(timeout_s + min(timeout_s, _LATE_S))
    except LinkError:
        raise
    except (RuntimeError, TimeoutError) as error:
        host, port = order.store
        raise LinkError(f"the store at {host}:{port}, where all processes meet, does not answer") from error


def _nccl(keys: PrefixStore, rank: int, world: int, limit: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = limit + timedelta(seconds=_GRACE_S)
    group: Any = ProcessGroupNCCL(keys, rank, world, options)
    group.barrier().wait()  # NCCL sets its communicator up in the first call that all processes make
    return group


def _key(order: Order, member: int) -> str:
    return f"update-{order.number}/{member}"


def _named(members: Sequence[int], order: Order) -> str:
    learners = order.inputs.placement.learners
    names = [
        f"learner rank {member}" if member < learners else f"engine rank {member - learners}" for member in members
    ]
    return ", ".join(names)
