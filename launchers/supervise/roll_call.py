"""Asks every actor of a run that stands still where it is, and names those that do not answer.

They are asked on their nodes, by signal (``launchers.supervise.stacks``): a call to an actor would wait behind what the
actor hangs in, or behind an argument that another one owes it.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launchers.supervise.stacks import children, listen, listens, seen_from_outside, stack_of

NODES_S = 60.0  # Ray may have to start a process, on a node in trouble

Whereabouts = tuple[str, int, int]  # Ray's node id, process id, file descriptor of ``listen``


class RollCall:
    """The actors of this process, by name."""

    def __init__(self) -> None:
        self._asked: dict[str, Any] = {}  # handle of an actor's whereabouts: asked for at once, later it may not answer
        self._silent: dict[str, Whereabouts] = {}

    def add(self, name: str, actor: Any) -> None:
        """Add an actor that has a method ``whereabouts``; it replaces one of the same name."""
        self._asked[name] = actor.whereabouts.remote()

    def remove(self, name: str) -> None:
        """Remove an actor that was closed."""
        self._asked.pop(name, None)

    def collect(self, folder: Path) -> list[str]:
        """Write a file into ``folder`` for each actor; returns the names of those that did not answer.

        Takes little longer than ``NODES_S``.
        """
        homes = {name: where for name, asked in self._asked.items() if (where := _known(asked))}
        heard = {name for names in _on_nodes(_listen_to, homes, folder) for name in names}
        self._silent = {name: where for name, where in homes.items() if name not in heard}
        return sorted(set(self._asked) - heard)

    def end_silent(self) -> None:
        """SIGKILL those that did not answer: they would not notice either that this process is gone."""
        _on_nodes(_kill, self._silent)


# Of this process: as there is one connection to Ray, there is one list of who is at its other end.
ROLL_CALL = RollCall()


def whereabouts() -> Whereabouts:
    """Of this actor, which listens from now on."""
    return ray.get_runtime_context().get_node_id(), os.getpid(), listen()


def _known(asked: Any) -> Whereabouts | None:
    with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):  # it died, or never came up
        return ray.get(asked, timeout=1)
    return None


def _on_nodes(task: Any, homes: Mapping[str, Whereabouts], *more: Any) -> list[Any]:
    """``task`` on every node of ``homes``, with those that are there; what the nodes that answer in time return."""
    nodes: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, (node, pid, descriptor) in homes.items():
        nodes[node][name] = (pid, descriptor)
    replies = []
    for node, there in nodes.items():
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        replies.append(task.options(num_cpus=0, scheduling_strategy=here).remote(there, *more))
    done = ray.wait(replies, num_returns=len(replies), timeout=NODES_S)[0] if replies else []
    results = []
    for reply in done:
        with suppress(ray.exceptions.RayError):  # that node is gone
            results.append(ray.get(reply))
    return results


@ray.remote
def _listen_to(actors: dict[str, tuple[int, int]], folder: Path) -> list[str]:
    """Write the stacks of these actors of this node, and of their children; names of those that answered."""

    def write(name: str) -> bool:
        pid, descriptor = actors[name]
        stack = stack_of(pid, descriptor)
        below = [seen_from_outside(child) for child in children(pid)]
        (folder / f"{name}.txt").write_text("\n".join([stack or seen_from_outside(pid), *below]))
        return bool(stack)

    with ThreadPoolExecutor(len(actors)) as threads:
        return [name for name, answered in zip(actors, threads.map(write, actors), strict=True) if answered]


@ray.remote
def _kill(actors: dict[str, tuple[int, int]]) -> None:
    for pid, descriptor in actors.values():
        if listens(pid, descriptor):
            os.kill(pid, signal.SIGKILL)
