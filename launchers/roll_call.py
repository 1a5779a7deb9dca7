"""The actors of a run that stands still: where each of them is, asked beside whatever it hangs in.

One that does not answer (stopped, or in native code that holds the interpreter) is looked at, and at last killed, from its node.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launchers.stacks import dump, seen_from_outside

ANSWER_S = 30.0  # for an actor to dump its stack, and those of its children
LOOK_S = 45.0  # for a look from outside: Ray may have to start a process for it, on a node in trouble


class Answering:
    """What makes an actor answer; its class needs a concurrency group ``control``."""

    @ray.method(concurrency_group="control")
    def whereabouts(self) -> tuple[str, int]:
        """Ray's id of this node, and this process's id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    @ray.method(concurrency_group="control")
    def dump(self, path: Path) -> None:
        """Write the stacks of this process and its children to ``path``."""
        dump(path, children=True)


class RollCall:
    """The actors of this process, by name."""

    def __init__(self) -> None:
        self._actors: dict[
            str, tuple[Any, Any]
        ] = {}  # handle, whereabouts (asked for at once: later it may not answer)
        self._silent: list[str] = []

    def add(self, name: str, actor: Any) -> None:
        """An ``Answering`` actor; one of the same name was its predecessor."""
        self._actors[name] = (actor, actor.whereabouts.remote())

    def remove(self, name: str) -> None:
        """An actor was closed."""
        self._actors.pop(name, None)

    def collect(self, folder: Path) -> list[str]:
        """A file per actor in ``folder``; names of the actors that did not answer. Takes ``ANSWER_S + LOOK_S`` at most."""
        asked = {actor.dump.remote(folder / f"{name}.txt"): name for name, (actor, _) in self._actors.items()}
        _, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
        self._silent = [asked[reply] for reply in waiting]
        self._on_nodes(_look, folder)
        return self._silent

    def end_silent(self) -> None:
        """SIGKILL those that did not answer: they would not notice either that the driver is gone."""
        self._on_nodes(_kill)

    def _on_nodes(self, task: Any, *more: Any) -> None:
        """Run ``task`` for every silent actor whose whereabouts are known, on its node."""
        replies = []
        for where in (self._actors[name][1] for name in self._silent):
            with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):  # it never said where it was
                node, pid = ray.get(where, timeout=1)
                home = NodeAffinitySchedulingStrategy(node, soft=False)
                replies.append(task.options(num_cpus=0, scheduling_strategy=home).remote(pid, *more))
        if replies:
            ray.wait(replies, num_returns=len(replies), timeout=LOOK_S)


ROLL_CALL = (
    RollCall()
)  # of this process: as there is one connection to Ray, there is one list of who is at its other end


@ray.remote
def _look(pid: int, folder: Path) -> None:
    with (folder / f"silent-{os.uname().nodename}-{pid}.txt").open("w") as file:
        file.write(seen_from_outside(pid))


@ray.remote
def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
