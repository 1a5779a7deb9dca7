"""One process's part in weight updates: it keeps its share of the plan and its link from one update to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from pipeline.reshard import digest
from pipeline.reshard.execute import EngineShards, Moved, Mover
from pipeline.reshard.handover import Handover, take
from pipeline.reshard.link import CPU, Link, refuse
from pipeline.reshard.messages import Reader
from pipeline.reshard.order import Order, PlanInputs, Report
from pipeline.reshard.places import Places


class Participant:
    """A learner rank calls ``send``, an engine rank ``receive``, each with the same order."""

    def __init__(self) -> None:
        self._planned: tuple[PlanInputs, int, torch.device] | None = None
        self._mover: Mover | None = None
        self._digest = ""
        self._link: Link | None = None

    def send(self, order: Order, rank: int, learner: Reader, device: torch.device | str = "cpu") -> Moved:
        """Send what learner rank ``rank`` holds and others need. ``device``: the rank's own.

        Raises ``LinkError``, ``ValueError`` and ``KeyError``; the group is then left, so that nobody waits for it.
        """
        placement = order.inputs.placement
        with self._coming(order, rank, rank, torch.device(device)) as (mover, link, _):
            if not placement.colocated or rank >= placement.engines:
                return mover.move(learner, EngineShards({}), link)
            link.meet()
            with closing(Handover(mover.stages, link.pair, mover.device)) as engine:
                moved = mover.move(learner, engine, link)
                engine.finish()
            return moved

    def receive(self, order: Order, rank: int, places: Places, device: torch.device | str = "cpu") -> Report:
        """Receive what engine rank ``rank``, numbered over all engines, needs to its ``places``.

        Never raises: within a server an exception would end it. What went wrong is in the report.
        """
        begun = time.perf_counter()
        placement = order.inputs.placement
        process, received, error = placement.engine_process(rank), 0, ""
        try:
            member = placement.learners + rank
            with self._coming(order, member, process, torch.device(device), places) as (mover, link, engine):
                if placement.colocated:
                    link.meet()
                    moved = take(mover.stages, engine, link.pair, mover.device)
                else:
                    moved = mover.move(EngineShards({}), engine, link)
            places.finish()
            received = moved.received
        except Exception as failure:  # noqa: BLE001 (whatever it is, it is reported, and the server lives)
            error = f"{type(failure).__name__}: {failure}"
        return Report(process, order.version, received, time.perf_counter() - begun, error)

    def close(self) -> None:
        """Leave the groups."""
        if self._link is not None:
            self._link.close()
        self._link = None

    @contextmanager
    def _coming(
        self, order: Order, member: int, process: int, device: torch.device, places: Places | None = None
    ) -> Iterator[tuple[Mover, Link, EngineShards]]:
        """Within, this member has come to the update; at the end, all have.

        On any failure, it tells the others: in words, or by leaving them.
        """
        came = False
        try:
            mover = self._prepared(order.inputs, process, device if order.backend == "nccl" else CPU)
            if self._digest != order.plan_digest:
                raise ValueError(f"it made another plan ({self._digest}) than the driver ({order.plan_digest})")
            engine = places.shards(mover.plan, process) if places else EngineShards({})
            if self._link is None or self._link.key != (order.store, order.generation):
                self.close()
                self._link = Link(order, member, mover.device)
            came = True
            self._link.come(order, self._digest)
            yield mover, self._link, engine
            self._link.meet()
        except BaseException as error:
            if not came:
                refuse(order, [member], f"{type(error).__name__}: {error}")
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
