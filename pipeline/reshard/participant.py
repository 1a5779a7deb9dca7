"""One process's part in weight updates: it keeps its share of the plan and its link from one update to the next."""

from __future__ import annotations

import time

import torch

from pipeline.reshard import digest
from pipeline.reshard.execute import EngineShards, Moved, Mover, Reader
from pipeline.reshard.link import Link, refuse
from pipeline.reshard.order import Order, PlanInputs, Report
from pipeline.reshard.places import Places


class Participant:
    """A learner rank calls :meth:`send`, an engine rank :meth:`receive`, each with the same order."""

    def __init__(self) -> None:
        self._planned: tuple[PlanInputs, int, torch.device] | None = None
        self._mover: Mover | None = None
        self._digest = ""
        self._link: Link | None = None

    def send(self, order: Order, process: int, learner: Reader, device: torch.device | str = "cpu") -> Moved:
        """Send what ``process`` holds and others need. ``device``: the rank's own.

        Raises ``LinkError``, ``ValueError`` and ``KeyError``; the group is then left, so that nobody waits for it.
        """
        moved = self._move(order, process, learner, None, torch.device(device))
        if self._link is not None:
            self._link.tidy()
        return moved

    def receive(self, order: Order, process: int, places: Places, device: torch.device | str = "cpu") -> Report:
        """Receive what ``process`` needs to its ``places``.

        Never raises: within a server an exception would end it. What went wrong is in the report.
        """
        begun = time.perf_counter()
        try:
            moved = self._move(order, process, EngineShards({}), places, torch.device(device))
            places.finish()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is reported, and the server lives)
            return Report(process, order.version, 0, time.perf_counter() - begun, f"{type(error).__name__}: {error}")
        return Report(process, order.version, moved.received, time.perf_counter() - begun)

    def close(self) -> None:
        """Leave the group."""
        if self._link is not None:
            self._link.close()
        self._link = None

    def _move(self, order: Order, process: int, learner: Reader, places: Places | None, device: torch.device) -> Moved:
        met = False
        device = device if order.backend == "nccl" else torch.device("cpu")
        try:
            mover = self._prepared(order.inputs, process, device)
            if self._digest != order.plan_digest:
                raise ValueError(f"it made another plan ({self._digest}) than the driver ({order.plan_digest})")
            engine = places.shards(mover.plan, process) if places else EngineShards({})
            if self._link is None or self._link.key != (order.store, order.generation):
                self.close()
                self._link = Link(order, process, device)
            met = True
            self._link.meet(order, self._digest)
            return mover.move(learner, engine, self._link)
        except BaseException as error:
            if not met:
                refuse(order, [process], f"{type(error).__name__}: {error}")
            self.close()
            raise

    def _prepared(self, inputs: PlanInputs, process: int, device: torch.device) -> Mover:
        """This process's share of the plan."""
        wanted = inputs, process, device
        if self._mover is None or self._planned != wanted:
            plan = inputs.plan()
            self._mover, self._digest = Mover.of(plan, process, device), digest.plan_digest(plan)
            self._planned = wanted
        return self._mover
