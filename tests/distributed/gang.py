"""A few spawned processes that run a function on every rank.

Importing megatron takes seconds, so they live for the whole session.
"""

import contextlib
import gc
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Of a process, before it is replaced: some process groups outlive their job, and each has threads of gloo's that wake a
# hundred times a second.
MOST_THREADS = 300


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, rank, world, address, arguments = job
        try:
            pipe.send((True, function(rank, world, address, *arguments)))
        except Exception:  # noqa: BLE001 (whatever it is, the test reports it)
            pipe.send((False, traceback.format_exc()))
        gc.collect()  # process groups sit in cycles


class Gang:
    """``run(function, world, *arguments)`` calls ``function(rank, world, address, *arguments)`` on ranks
    ``0..world-1``.
    """

    def __init__(self, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._members: list[tuple[mp.process.BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """Results by rank. A rank that raises or hangs fails the test; the processes are then replaced."""
        if any(len(os.listdir(f"/proc/{process.pid}/task")) > MOST_THREADS for process, _ in self._members):
            self.close()
        while len(self._members) < world:
            self._members.append(_start())
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

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._members:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
            process.join(0.5)
            if process.is_alive():
                process.kill()
        self._members.clear()


def _start() -> tuple[mp.process.BaseProcess, Connection]:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    return process, ours


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
