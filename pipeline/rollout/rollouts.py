"""What the loop uses to draw samples: pushes the learner's weights to the engines, generates, restarts lost engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.learner import Learner
from pipeline.rollout.engine import EngineError
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.weight_sync import push_weights
from pipeline.types import GenerateRequest, SampleGroup

log = logging.getLogger(__name__)


class Rollouts:
    """``generate`` with the weights last pushed.

    An engine that died is started again once per call, with those weights.

    Args:
        learner: where weights come from; it must still hold the version last pushed when ``generate`` is called.
        hf_path: what an engine is started with before it receives weights.
        on_fault: told of every engine brought back, in words.
        colocated: engines and learner share GPUs, and take turns with their memory.
    """

    def __init__(
        self,
        pool: EnginePool,
        learner: Learner,
        hf_path: Path,
        on_fault: Callable[[str], None] = log.warning,
        *,
        colocated: bool = False,
    ) -> None:
        self._pool, self._learner, self._hf_path, self._on_fault = pool, learner, hf_path, on_fault
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
            push_weights(self._learner, self._pool, version)
        except EngineError as error:
            self._revive(error)
            push_weights(self._learner, self._pool, version)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[SampleGroup]:
        """One group per request, in order.

        Raises ``EngineError`` when no engine had died, or when a second try fails too.
        """
        try:
            return self._pool.generate(requests)
        except EngineError as error:
            self._revive(error)
            push_weights(self._learner, self._pool, self._version)
            return self._pool.generate(requests)

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures of weight sync and engines for a step's record.

        ``alive`` are the engines that were not started again since the last call.
        """
        self._size = self._size or self._learner.export_size()
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

    def _revive(self, error: EngineError) -> None:
        revived = self._pool.revive(self._hf_path)
        if not revived:
            raise error
        self._revived.update(revived)
        self._on_fault(f"engine {', '.join(map(str, revived))} was started again: {error}")
