"""Moves the learner's weights into the engines, as one version, all or nothing."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property

import torch

from pipeline.learner import Learner
from pipeline.reshard.digest import plan_digest
from pipeline.reshard.link import refuse
from pipeline.reshard.order import Order, PlanInputs, Probe
from pipeline.reshard.plan import Plan
from pipeline.rollout.engine import EngineError, RolloutEngine, WeightUpdateError
from pipeline.types import TrainBatch

_PROBE_TOKENS = 16
_FAILURES = (EngineError, OSError, RuntimeError, ValueError)


class WeightSync:
    """Pushes weights by the reshard plan from the learner's ranks straight to the engines' ranks.

    Args:
        engines: every engine of ``inputs``, behind the protocol of one.
        inputs: what every process makes the plan from.
        timeout_s: what the processes of one update have to meet and move it.
        backend: of the process group, "gloo" or "nccl".
        probe: after a start of engines, compare what they compute with what the learner computes.
    """

    def __init__(
        self,
        learner: Learner,
        engines: RolloutEngine,
        inputs: PlanInputs,
        timeout_s: float,
        *,
        backend: str = "gloo",
        probe: bool = False,
    ) -> None:
        self._learner, self._engines, self._inputs = learner, engines, inputs
        self._timeout_s, self._backend, self._probe = timeout_s, backend, probe
        self._numbers = itertools.count()
        self._generation = 0
        self._probed = -1  # generation
        self._thread = ThreadPoolExecutor(1, "receive")

    def push(self, version: int) -> None:
        """Send, verify and serve ``version``; on any failure the update is aborted on every engine.

        Raises ``WeightUpdateError`` naming the phase that failed; the engines then refuse to generate until a later
        push succeeds.
        """
        phase = "begin_update"
        try:
            self._engines.begin_update(version)
            phase = "receive"
            order = self._order(version)
            self._transfer(order)
            phase = "verify_update"
            self._engines.verify_update(version)
            phase = "commit_update"
            self._engines.commit_update(version)
        except _FAILURES as error:
            self.renew()
            self._engines.abort_update()
            raise WeightUpdateError(f"push of weight version {version} failed in {phase}: {error}") from error
        self._probed = order.generation

    def renew(self) -> None:
        """Have the next update form its process group anew: a process was lost, or started again."""
        self._generation += 1

    def size(self) -> tuple[int, int]:
        """Bytes that travel between processes, and buckets, of every version."""
        return int(self._plan.traffic()[1:, 1].sum()), self._plan.buckets

    @cached_property
    def _plan(self) -> Plan:
        return self._inputs.plan()

    @cached_property
    def _digest(self) -> str:
        return plan_digest(self._plan)

    @cached_property
    def _store(self) -> tuple[str, int]:
        return self._learner.meeting_point(one_machine=len(set(self._inputs.placement.nodes)) == 1)

    def _order(self, version: int) -> Order:
        return Order(
            number=next(self._numbers),
            version=version,
            inputs=self._inputs,
            plan_digest=self._digest,
            store=self._store,
            generation=self._generation,
            timeout_s=self._timeout_s,
            backend=self._backend,
            probe=self._asked() if self._probe and self._probed != self._generation else None,
        )

    def _asked(self) -> Probe:
        """What the learner computes for random tokens."""
        tokens = torch.randint(self._plan.model.vocab, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))
        said = self._learner.log_probs(_row(tokens))
        return Probe(tuple(tokens.tolist()), tuple(said.tolist()))

    def _transfer(self, order: Order) -> None:
        """Both sides at the same time; where one fails, it tells the other (engines: their pool), so nobody waits."""
        failed = []
        received = self._thread.submit(self._engines.receive, order)
        try:
            self._learner.send(order)
        except BaseException as error:
            refuse(order, range(order.inputs.placement.learners), str(error))
            if not isinstance(error, _FAILURES):
                wait([received])
                raise
            failed.append(error)
        try:
            received.result()
        except _FAILURES as error:
            failed.append(error)
        if failed:
            raise WeightUpdateError("; ".join(map(str, failed))) from failed[0]


def _row(tokens: torch.Tensor) -> TrainBatch:
    """A batch of one row, every token of which but the first is a target."""
    count = len(tokens)
    one, none = torch.ones(1), torch.zeros(1, dtype=torch.bool)
    return TrainBatch(
        tokens=tokens.to(torch.int32),
        loss_mask=torch.arange(count) > 0,
        lengths=torch.tensor([count]),
        targets=torch.tensor([count - 1]),
        weights=one,
        advantages=one,
        auxiliary=none,
        correct=none,
        temperatures=one,
        behavior_log_probs=torch.zeros(count - 1),
    )
