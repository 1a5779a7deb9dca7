"""Deals requests to several engines, and hands out what they draw as it comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

from pipeline.clock import Busy
from pipeline.rollout.engine import EngineError, Finished, RolloutEngine
from pipeline.types import GenerateRequest

log = logging.getLogger(__name__)


def draw(
    engines: Sequence[RolloutEngine],
    busy: Sequence[Busy],
    requests: Sequence[GenerateRequest],
    wanted: Container[int],
    *,
    take_over: bool,
) -> Iterator[Finished]:
    """Every group as it finishes, whichever engine drew it; all samples of a request on one engine.

    Raises what failed, once all have ended.

    Args:
        busy: told when each engine has requests.
        wanted: positions of the requests that are to be drawn; who draws them is as if all were.
        take_over: ask what an engine that died had not finished of the others, once, under the same seeds.
    """
    arrived: SimpleQueue[Finished | tuple[_Share, BaseException | None]] = SimpleQueue()
    alive, running, failed = list(zip(engines, busy, strict=True)), 0, list[BaseException]()
    with ThreadPoolExecutor(len(engines) ** 2, "draw") as threads:

        def ended(share: _Share, future: Future[None]) -> None:
            arrived.put((share, future.exception()))

        def ask(left: dict[int, GenerateRequest], *, again: bool) -> int:
            numbers, parts = list(left), split_requests(list(left.values()), len(alive))
            dealt = [{numbers[i]: left[numbers[i]] for i in part if numbers[i] in wanted} for part in parts]
            shares = [_Share(*asked, own, again) for asked, own in zip(alive, dealt, strict=True) if own]
            for share in shares:
                threads.submit(share.run, arrived.put).add_done_callback(partial(ended, share))
            return len(shares)

        running = ask(dict(enumerate(requests)), again=False)
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


def split_requests(requests: Sequence[GenerateRequest], engines: int) -> list[list[int]]:
    """Indices of the requests that each engine takes: the longest first, each to the engine with the least work so far.

    Work is prompt tokens once plus ``samples * max_new_tokens`` (greedy LPT, Graham 1969: at most 4/3 of the optimum).
    """
    work = [len(r.prompt.token_ids) + len(r.seeds) * r.max_new_tokens for r in requests]
    loads = [0] * engines
    shares: list[list[int]] = [[] for _ in range(engines)]
    for i in sorted(range(len(requests)), key=lambda i: (-work[i], i)):
        least = loads.index(min(loads))
        loads[least] += work[i]
        shares[least].append(i)
    return [sorted(share) for share in shares]


class _Share:
    """What one engine was asked, and has not finished."""

    def __init__(self, engine: RolloutEngine, busy: Busy, left: dict[int, GenerateRequest], again: bool) -> None:
        """``left``: requests by position. ``again``: an engine that died was asked before."""
        self.engine, self.left, self.again = engine, left, again
        self._busy = busy

    def run(self, hand_out: Callable[[Finished], None]) -> None:
        """Hand out every group as it finishes."""
        numbers = list(self.left)
        with self._busy:
            for some in self.engine.stream(list(self.left.values())):
                finished = [(numbers[i], group) for i, group in some]
                for number, _ in finished:
                    del self.left[number]
                hand_out(finished)
