"""A few processes that run a function on every rank.

Importing megatron takes seconds, so one process does it for all, the ranks are forked from it, and they live for the
whole session.
"""

import contextlib
import gc
import multiprocessing as mp
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.util import get_temp_dir
from typing import Any

FEWEST = 4  # that are started: few tests need more
# Of a process, before it is replaced: some process groups outlive their job, and each has threads of gloo's that wake a
# hundred times a second.
MOST_THREADS = 300


def _become_ranks(pipes: list[Connection]) -> None:
    """Import what every rank needs, then fork a rank for each pipe."""
    os.setpgrp()
    import torch

    import megatron_ext.learner  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # else every collection looks through what megatron's import left: a million objects
    for pipe in pipes:
        if os.fork() == 0:
            for other in pipes:
                if other is not pipe:
                    other.close()  # so that each ends with its rank alone
            with contextlib.suppress(EOFError):
                _serve(pipe)
            os._exit(0)
    for pipe in pipes:
        pipe.close()
    for _ in pipes:
        os.wait()


def _serve(pipe: Connection) -> None:
    pipe.send(os.getpid())
    while (job := pipe.recv()) is not None:
        function, rank, world, address, arguments = job
        try:
            pipe.send((True, function(rank, world, address, *arguments)))
        except Exception:  # noqa: BLE001 (whatever it is, the test reports it)
            pipe.send((False, traceback.format_exc()))
        _let_go()


def _let_go() -> None:
    """Free what a job made: models and optimizers hold process groups, each with threads of gloo's.

    Megatron's hooks on gradients are in circles through C++ that Python's collector cannot see.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    for each in gc.get_objects():
        if issubclass(type(each), DistributedDataParallel | MegatronOptimizer):
            each.__dict__.clear()
    gc.collect()


class Gang:
    """``run(function, world, *arguments)`` calls ``function(rank, world, address, *arguments)`` on ranks
    ``0..world-1``.
    """

    def __init__(self, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._parent: mp.process.BaseProcess | None = None
        self._members: list[tuple[int, Connection]] = []  # process ids

    def run(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """Results by rank. A rank that raises or hangs fails the test; the processes are then replaced."""
        if any(len(os.listdir(f"/proc/{pid}/task")) > MOST_THREADS for pid, _ in self._members):
            self.close()
        if len(self._members) < world:
            self.close()
            self._start(max(world, FEWEST))
        results, taken = self._run(function, world, arguments)
        return results if not taken else self.run(function, world, *arguments)

    def _run(self, function: Callable[..., Any], world: int, arguments: tuple[Any, ...]) -> tuple[list[Any], bool]:
        """Results by rank, and whether another process took the port between its choice and its use."""
        address = ("127.0.0.1", _free_port())
        for rank in range(world):
            self._members[rank][1].send((function, rank, world, address, arguments))
        deadline = time.monotonic() + self._timeout_s
        results = []
        for rank in range(world):
            pipe = self._members[rank][1]
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} of {world} did not finish {function.__name__} in {self._timeout_s} s")
            good, value = pipe.recv()
            if not good:
                self.close()
                if "EADDRINUSE" in value:
                    return [], True
                raise AssertionError(f"rank {rank} of {world} failed:\n{value}")
            results.append(value)
        return results, False

    def _start(self, ranks: int) -> None:
        get_temp_dir()  # goes with this process; ranks inherit it, and would leave one of their own, for they just end
        ours, theirs = zip(*(mp.Pipe() for _ in range(ranks)), strict=True)
        self._parent = mp.get_context("spawn").Process(target=_become_ranks, args=(list(theirs),), daemon=True)
        self._parent.start()
        for pipe in theirs:
            pipe.close()
        self._members = [(pipe.recv(), pipe) for pipe in ours]

    def close(self) -> None:
        """End the processes."""
        if self._parent is None:
            return
        for _, pipe in self._members:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        self._parent.join(0.5)
        if self._parent.is_alive():
            os.killpg(self._parent.pid, signal.SIGKILL)
        self._parent.join()
        self._parent = None
        self._members.clear()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
