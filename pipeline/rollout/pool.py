"""Several rollout engines behind the protocol of one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from pipeline.clock import Span
from pipeline.reshard.link import refuse
from pipeline.reshard.order import Order
from pipeline.rollout.deal import draw, raise_failed
from pipeline.rollout.engine import EngineError, Finished, RolloutEngine, WeightUpdateError
from pipeline.rollout.load import Load
from pipeline.types import EngineHealth, GenerateRequest

T = TypeVar("T")


class EnginePool(RolloutEngine):
    """``RolloutEngine`` over engines that run at the same time.

    Requests are divided by expected tokens. An update is all or nothing: all engines verify before any commits, and the
    pool generates only when every engine has committed the same version; one failure makes the whole pool refuse until
    a later update commits.
    """

    def __init__(self, engines: Sequence[RolloutEngine], *, take_over: bool = False, measured: bool = False) -> None:
        """``take_over``: engines draw what one that died had not finished; else it is to be revived first.

        ``measured``: a slow engine gets less; else who draws which depends on the requests alone.
        """
        if not engines:
            raise EngineError("engine pool: no engines; set rollout.engines to at least 1")
        self._engines = tuple(engines)
        self._loads = tuple(Load() for _ in engines)
        self._take_over, self._measured = take_over, measured
        self._threads = ThreadPoolExecutor(len(engines), "engine") if len(engines) > 1 else None
        self._consistent = False
        self._updating: int | None = None  # version of the update in progress
        self._verified = False  # by every engine

    def __len__(self) -> int:
        """Engines."""
        return len(self._engines)

    def start(self, hf_path: Path) -> None:
        """Start every engine with the same folder, at the same time; if one fails, all are closed."""
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._on_all(lambda engine: engine.start(hf_path))
            on_failure.pop_all()
        self._consistent = True

    def revive(self, hf_path: Path) -> list[int]:
        """Close and start again every engine that is not alive; returns their indices.

        They come up with the folder's weights, so the pool generates again only after the next update commits; if none
        was dead, nothing changes. Raises what ``start`` raises; then call again later.
        """
        states = self._map(lambda engine: engine.health(), self._engines)
        dead = [i for i, state in enumerate(states) if not state.alive]

        def restart(engine_index: int) -> None:
            self._engines[engine_index].close()
            self._engines[engine_index].start(hf_path)

        if dead:
            self._consistent = False
            self._map(restart, dead)
        return dead

    def stream(self, requests: Sequence[GenerateRequest], wanted: Collection[int] | None = None) -> Iterator[Finished]:
        """Every group as it finishes, see ``pipeline.rollout.deal.draw``. ``wanted``: all positions unless given."""
        if not self._consistent:
            raise EngineError(
                "engine pool: not every engine serves the same weights; start it or push the weights again"
            )
        wanted = range(len(requests)) if wanted is None else wanted
        if len(self._engines) == 1 and len(wanted) == len(requests):
            with self._loads[0].busy:
                yield from self._engines[0].stream(requests)
        else:
            yield from draw(
                self._engines, self._loads, requests, wanted, take_over=self._take_over, measured=self._measured
            )

    def busy(self) -> list[list[Span]]:
        """When each engine had requests, since this was last asked."""
        return [load.busy.take() for load in self._loads]

    def release(self) -> None:
        """Have every engine leave its GPUs; the pool generates again after the next update."""
        self._consistent = False
        self._on_all(lambda engine: engine.release())

    def begin_update(self, version: int) -> None:
        """Pause every engine."""
        self._consistent, self._verified = False, False
        self._updating = version
        self._on_all(lambda engine: engine.begin_update(version))

    def receive(self, order: Order, engine: int = 0) -> None:
        """Have every engine take its part; they are numbered from ``engine`` on."""

        def take(number: int) -> None:
            try:
                self._engines[number].receive(order, engine + number)
            except BaseException as error:
                refuse(order, order.inputs.engine_members(engine + number), str(error))  # so that nobody waits for it
                raise

        self._map(take, range(len(self._engines)))

    def verify_update(self, version: int) -> None:
        """Verify on every engine; all stay paused."""
        self._check_updating("verify_update", version)
        self._on_all(lambda engine: engine.verify_update(version))
        self._verified = True

    def commit_update(self, version: int) -> None:
        """Commit everywhere, once all have verified; only when all have succeeded does the pool generate again."""
        self._check_updating("commit_update", version)
        if not self._verified:
            raise WeightUpdateError(f"engine pool: commit_update({version}) before every engine has verified it")
        self._updating, self._verified = None, False
        self._on_all(lambda engine: engine.commit_update(version))
        self._consistent = True

    def abort_update(self) -> None:
        """Drop the update on every engine, also on those that had no part in what failed."""
        self._consistent, self._verified, self._updating = False, False, None
        self._on_all(lambda engine: engine.abort_update())

    def abort(self) -> None:
        """End running requests on every engine, also when one of them raises."""
        self._on_all(lambda engine: engine.abort())

    def health(self) -> EngineHealth:
        """Alive when all are; the version is the common one, None when they differ."""
        states = [engine.health() for engine in self._engines]
        versions = {state.weight_version for state in states}
        version = versions.pop() if self._consistent and len(versions) == 1 else None
        details = [f"engine {i}: {state.detail}" for i, state in enumerate(states) if state.detail]
        return EngineHealth(all(state.alive for state in states), version, "; ".join(details))

    def close(self) -> None:
        """Close every engine, also when one of them raises; an error is raised at the end."""
        self._consistent = False
        with ExitStack() as stack:  # runs every callback, whatever the others raise
            if self._threads is not None:
                stack.callback(self._threads.shutdown)
            for engine in self._engines:
                stack.callback(engine.close)

    def _check_updating(self, operation: str, version: int) -> None:
        if version != self._updating:
            raise WeightUpdateError(
                f"engine pool: {operation}({version}), but the update in progress is {self._updating}"
            )

    def _on_all(self, action: Callable[[RolloutEngine], None]) -> None:
        self._map(action, self._engines)

    def _map(self, action: Callable[..., T], items: Sequence[object]) -> list[T]:
        """Apply to all, at the same time; waits for all of them before it raises what failed."""
        if self._threads is None:
            return [action(item) for item in items]
        futures = [self._threads.submit(action, item) for item in items]
        raise_failed([error for future in futures if (error := future.exception()) is not None])
        return [future.result() for future in futures]
