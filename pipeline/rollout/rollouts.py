"""What the loop uses to draw samples: pushes the learner's weights to the engines, generates, restarts lost engines."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from pipeline.learner import Learner
from pipeline.model import architecture
from pipeline.rollout.arrivals import checked
from pipeline.rollout.engine import EngineError
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.weight_sync import WeightSync
from pipeline.types import GenerateRequest, SampleGroup

log = logging.getLogger(__name__)


class Rollouts:
    """``generate`` with the weights last pushed.

    An engine that died is started again once per call, with those weights.

    Args:
        learner: where weights come from; it must still hold the version last pushed when ``generate`` is called.
        sync: moves them into the engines of ``pool``.
        hf_path: what an engine is started with before it receives weights.
        on_fault: told of every engine brought back and of samples left out, in words.
        colocated: engines and learner share GPUs, and take turns with their memory.
    """

    def __init__(
        self,
        pool: EnginePool,
        learner: Learner,
        sync: WeightSync,
        hf_path: Path,
        on_fault: Callable[[str], None] = log.warning,
        *,
        colocated: bool = False,
    ) -> None:
        self._pool, self._learner, self._sync = pool, learner, sync
        self._hf_path, self._on_fault = hf_path, on_fault
        self._colocated = colocated
        self._version = 0
        self._size: tuple[int, int] | None = None  # of a weight sync
        self._revived: set[int] = set()  # engines, since figures were last asked for

    def push(self, version: int) -> None:
        """Hand the learner's weights over as ``version``. Raises ``WeightUpdateError`` when a second try fails too."""
        self._version = version
        if self._colocated:
            self._learner.empty_cache()
        try:
            self._sync.push(version)
        except EngineError as error:
            self._revive(error)
            self._sync.push(version)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[SampleGroup]:
        """One group per request, in order.

        Samples that cannot be right come back empty and aborted, and ``on_fault`` is told. Where none is right, all are
        drawn once more. Raises ``EngineError`` when no engine had died, or when a second try fails too.
        """
        groups, faults = self._drawn(requests)
        if faults and faults.total() == sum(len(request.seeds) for request in requests):
            self._on_fault(f"every sample is drawn again: {_told(faults)}")
            groups, faults = self._drawn(requests)
            if faults.total() == sum(len(request.seeds) for request in requests):
                raise EngineError(
                    f"no sample of {faults.total()} is fit for use, twice in a row: {_told(faults)}; look at the "
                    "engines' logs, and whether they serve the learner's model"
                )
        if faults:
            self._on_fault(f"{faults.total()} samples are left out: {_told(faults)}")
        return groups

    def _drawn(self, requests: Sequence[GenerateRequest]) -> tuple[list[SampleGroup], Counter[str]]:
        """The groups, checked, and how many samples have which fault; an engine that died is started again, once."""
        try:
            groups = self._pool.generate(requests)
        except EngineError as error:
            self._revive(error)
            self._sync.push(self._version)
            groups = self._pool.generate(requests)
        return checked(groups, requests, self._vocabulary)

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures of weight sync and engines for a step's record.

        ``alive`` are the engines that were not started again since the last call.
        """
        self._size = self._size or self._sync.size()
        engines: dict[str, float] = {"alive": len(self._pool) - len(self._revived), "total": len(self._pool)}
        self._revived = set()
        return {"sync": dict(zip(("bytes", "buckets"), self._size, strict=True)), "engines": engines}

    def make_room(self) -> None:
        """Before the learner trains: engines on its GPUs leave them, until the next ``push``."""
        if not self._colocated:
            return
        try:
            self._pool.release()
        except EngineError as error:
            self._revive(error)
            self._pool.release()

    @cached_property
    def _vocabulary(self) -> int:
        """Token ids that the model has an embedding for."""
        return architecture.read(self._hf_path).vocab

    def _revive(self, error: EngineError) -> None:
        revived = self._pool.revive(self._hf_path)
        if not revived:
            raise error
        self._sync.renew()
        self._revived.update(revived)
        self._on_fault(f"engine {', '.join(map(str, revived))} was started again: {error}")


def _told(faults: Counter[str]) -> str:
    return ", ".join(f"{count} with {fault}" for fault, count in faults.items())
