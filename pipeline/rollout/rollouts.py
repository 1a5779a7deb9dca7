"""What the loop uses to draw samples: pushes the learner's weights to the engines, generates, restarts lost engines."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pipeline.clock import Span
from pipeline.learner import Learner
from pipeline.model import architecture
from pipeline.rollout.arrivals import checked
from pipeline.rollout.engine import EngineError, Finished, in_order
from pipeline.rollout.parts import joined, remainder
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.weight_sync import WeightSync
from pipeline.types import GenerateRequest, SampleGroup

log = logging.getLogger(__name__)


class Rollouts:
    """``generate`` with the weights last pushed.

    An engine that died is started again once per call, with those weights.

    Args:
        learner: where weights come from; what changes them is done within ``training``.
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
        self._size: tuple[int, int] | None = None  # of a weight sync
        self._revived: set[int] = set()  # engines, since figures were last asked for
        self._held = 0  # version of the learner's weights
        self._learner_free = threading.Lock()  # its weights do not change and nobody else reads them
        self._mending = threading.Lock()
        self._mended = 0  # times that engines were started again while samples were drawn

    def push(self, version: int) -> None:
        """Hand the learner's weights over as ``version``. Raises ``WeightUpdateError`` when a second try fails too."""
        self._held = version
        if self._colocated:
            self._learner.empty_cache()
        try:
            self._sync.push(version)
        except EngineError as error:
            self._revive(error)
            self._sync.push(version)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[SampleGroup]:
        """As ``stream``: one group per request, in order, once all are finished."""
        return in_order(self.stream(requests), len(requests))

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """Every group as it finishes. Several calls may run at once, each in a thread of its own.

        After ``abort``, groups hold what there is of their samples; a request with these as ``begun`` goes on with
        them, and its group has the whole of each. Samples that cannot be right come back empty and aborted, and
        ``on_fault`` is told. Where none is right, all are drawn once more. Raises ``EngineError`` when no engine had
        died, or when a second try fails too.
        """
        faults = Counter[str]()
        unfit: Finished = []  # kept back until one sample is right
        for last_try in (False, True):
            right, faults, unfit = 0, Counter[str](), []
            for some in self._drawn(requests):
                groups, found = checked([group for _, group in some], [requests[i] for i, _ in some], self._vocabulary)
                faults += found
                right += sum(len(requests[i].seeds) for i, _ in some) - found.total()
                unfit += [(i, group) for (i, _), group in zip(some, groups, strict=True)]
                if right:
                    yield unfit
                    unfit = []
            if right or not faults:
                break
            if last_try:
                raise EngineError(
                    f"no sample of {faults.total()} is fit for use, twice in a row: {_told(faults)}; look at the "
                    "engines' logs, and whether they serve the learner's model"
                )
            self._on_fault(f"every sample is drawn again: {_told(faults)}")
        if unfit:
            yield unfit
        if faults:
            self._on_fault(f"{faults.total()} samples are left out: {_told(faults)}")

    def _drawn(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """The groups as they come, whole; when an engine has died and nobody took its place, it is started again,
        once.
        """
        left = set(range(len(requests)))
        asked = [remainder(request) for request in requests]
        for may_revive in (True, False):
            mended = self._mended
            try:
                for some in self._pool.stream(asked, frozenset(left)):
                    left -= {number for number, _ in some}
                    yield [(number, joined(requests[number], group)) for number, group in some]
                break
            except EngineError as error:
                if not may_revive:
                    raise
                self._mend(error, mended)
        if left:
            raise EngineError(f"engines answered {len(requests)} requests with {len(requests) - len(left)} groups")

    def _mend(self, error: EngineError, mended: int) -> None:
        """Start dead engines again, unless another call has done so since there were ``mended`` such times."""
        with self._mending:
            if self._mended == mended:
                self._revive(error)
                with self._learner_free:  # by then it may hold the next version
                    self._sync.push(self._held)
                self._mended += 1

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures of weight sync and engines for a step's record.

        ``alive`` are the engines that were not started again since the last call.
        """
        self._size = self._size or self._sync.size()
        engines: dict[str, float] = {"alive": len(self._pool) - len(self._revived), "total": len(self._pool)}
        self._revived = set()
        return {"sync": dict(zip(("bytes", "buckets"), self._size, strict=True)), "engines": engines}

    def busy(self) -> list[list[Span]]:
        """When each engine had requests, since this was last asked."""
        return self._pool.busy()

    @contextmanager
    def training(self, version: int) -> Iterator[None]:
        """Within, the learner trains to hold ``version``. Engines on its GPUs leave them, until the next ``push``."""
        with self._learner_free:
            if self._colocated:
                self._make_room()
            yield
            self._held = version

    def abort(self) -> None:
        """End what is being drawn."""
        self._pool.abort()

    def _make_room(self) -> None:
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
