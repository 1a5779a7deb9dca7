"""Deals requests to several engines, and hands out what they draw as it comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

from pipeline.rollout.engine import EngineError, Finished, RolloutEngine
from pipeline.rollout.load import Load, work
from pipeline.types import GenerateRequest

log = logging.getLogger(__name__)


def draw(
    engines: Sequence[RolloutEngine],
    loads: Sequence[Load],
    requests: Sequence[GenerateRequest],
    wanted: Container[int],
    *,
    take_over: bool,
    measured: bool = False,
) -> Iterator[Finished]:
    """Every group as it finishes, whichever engine drew it; all samples of a request on one engine.

    Raises what failed, once all have ended.

    Args:
        loads: the engines', told what they are asked and how fast they answer.
        wanted: positions of the requests that are to be drawn; unless ``measured``, who draws them is as if all were.
        take_over: ask what an engine that died had not finished of the others, once, under the same seeds.
        measured: deal by what engines have in hand and by how fast they were; else by the requests alone, so that who
            draws which does not depend on anybody's speed.
    """
    arrived: SimpleQueue[Finished | tuple[_Share, BaseException | None]] = SimpleQueue()
    alive, running, failed = list(zip(engines, loads, strict=True)), 0, list[BaseException]()
    with ThreadPoolExecutor(len(engines) ** 2, "draw") as threads:

        def ended(share: _Share, future: Future[None]) -> None:
            arrived.put((share, future.exception()))

        def ask(left: dict[int, GenerateRequest], *, again: bool) -> int:
            given = [load for _, load in alive] if measured else [Load() for _ in alive]
            numbers, parts = list(left), split_requests(list(left.values()), given)
            dealt = [{numbers[i]: left[numbers[i]] for i in part if numbers[i] in wanted} for part in parts]
            shares = [_Share(*asked, own, again) for asked, own in zip(alive, dealt, strict=True) if own]
            for share in shares:
                threads.submit(share.run, arrived.put).add_done_callback(partial(ended, share))
            return len(shares)

        running = ask({i: r for i, r in enumerate(requests) if i in wanted or not measured}, again=False)
        while running:
            some = arrived.get()
            if isinstance(some, list):
                yield some
                continue
            running -= 1
            share, error = some
            if error is None:
                continue
            dead = isinstance(error, EngineError) and not share.engine.health().alive
            alive = [asked for asked in alive if asked[0] is not share.engine] if dead else alive
            if take_over and dead and alive and not share.again:
                log.warning("%d requests are asked of other engines: %s", len(share.left), error)
                running += ask(share.left, again=True)
            else:
                failed.append(error)
    raise_failed(failed)


def raise_failed(failed: Sequence[BaseException]) -> None:
    """Raise what failed, if anything did; several engine errors become one."""
    if len(failed) > 1 and all(isinstance(error, EngineError) for error in failed):
        alike = len({type(error) for error in failed}) == 1
        raise (type(failed[0]) if alike else EngineError)("; ".join(map(str, failed))) from failed[0]
    if failed:
        raise failed[0]


def split_requests(requests: Sequence[GenerateRequest], loads: Sequence[Load]) -> list[list[int]]:
    """Indices of the requests that each engine takes: the longest first, each to the engine that will end it soonest.

    The end is what an engine has in hand and the request, over its speed (greedy LPT, Graham 1969: at most 4/3 of the
    optimum with equal engines). An engine of which nothing is known is taken for as fast as the mean of the others.
    """
    known = [load.speed for load in loads if load.speed is not None]
    speeds = [load.speed or (sum(known) / len(known) if known else 1.0) for load in loads]
    tokens = list(map(work, requests))
    expected = [load.expected for load in loads]
    shares: list[list[int]] = [[] for _ in loads]
    for i in sorted(range(len(requests)), key=lambda i: (-tokens[i], i)):
        ends = [(had + tokens[i]) / speed for had, speed in zip(expected, speeds, strict=True)]
        soonest = ends.index(min(ends))
        expected[soonest] += tokens[i]
        shares[soonest].append(i)
    return [sorted(share) for share in shares]


class _Share:
    """What one engine was asked, and has not finished."""

    def __init__(self, engine: RolloutEngine, load: Load, left: dict[int, GenerateRequest], again: bool) -> None:
        """``left``: requests by position. ``again``: an engine that died was asked before."""
        self.engine, self.left, self.again = engine, left, again
        self._load = load
        load.add(self._work())  # here, before anything else is dealt

    def run(self, hand_out: Callable[[Finished], None]) -> None:
        """Hand out every group as it finishes."""
        numbers, began = list(self.left), time.monotonic()
        tokens, seconds = 0, 0.0
        try:
            with self._load.busy:
                for some in self.engine.stream(list(self.left.values())):
                    finished = [(numbers[i], group) for i, group in some]
                    for number, group in finished:
                        self._load.add(-work(self.left.pop(number)))
                        tokens += max((len(sample.token_ids) for sample in group.samples), default=0)
                        seconds += time.monotonic() - began
                    hand_out(finished)
        finally:
            self._load.add(-self._work())  # of what an engine that died has not finished
            self._load.learn(tokens, seconds)

    def _work(self) -> int:
        return sum(map(work, self.left.values()))
