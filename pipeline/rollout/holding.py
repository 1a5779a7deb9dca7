"""Keeps samples being drawn beside the training: what runs at a weight update ends first, or is held and goes on.

A held response is ended on its engine and asked again, its tokens so far behind its prompt, once the new weights are
in force. One mechanism so serves updates, checkpoints of what runs, and engines that die. Its draws go on as if nothing
had happened: an engine that honours seeds draws token n of a response by its seed and n alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from pipeline.rollout.engine import EngineError, Finished
from pipeline.rollout.merged import Merged
from pipeline.types import GenerateRequest

_AGAIN_S = 0.2  # a request that an engine was only about to get is not ended with the others


class ClosedError(RuntimeError):
    """Nothing is drawn any more."""


class Source(Protocol):
    """What draws; see ``pipeline.rollout.rollouts.Rollouts``."""

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """Every group as it finishes."""
        ...

    def abort(self) -> None:
        """End what is being drawn."""


class Asked(Protocol):
    """Requests, and how far they are."""

    left: dict[int, GenerateRequest]  # by number
    times_held: int  # weight updates that they went through

    @property
    def updates(self) -> int:
        """Weight updates that they may go through until they must be finished."""


class Holding:
    """What threads draw through, so that weights can change while they do.

    Args:
        source: draws.
        partial: hold responses at a weight update; else they end first.
        by_count: hold a response after its share of the longest one's tokens, the same share with every version of the
            weights, and none by the clock. Which weights draw which token then depends on nobody's speed.
    """

    def __init__(self, source: Source, *, partial: bool = False, by_count: bool = False) -> None:
        self._source, self._partial, self._by_count = source, partial, by_count
        self._changed = threading.Condition()
        self._settled = self._closed = False
        self._active = 0  # threads that draw or verify
        self._waiting = 0  # threads that hold what they draw
        self._releases = 0
        self._since, self._seconds = 0.0, 0.0  # when the first of them began; how long some were active before

    def begin(self) -> None:
        """A thread is about to draw: called once for each, before it runs; ``end`` is called after it."""
        with self._changed:
            self._add(1)

    def end(self) -> None:
        """The thread is done."""
        with self._changed:
            self._add(-1)

    def stream(self, asked: Asked, *, grows: bool = False) -> Iterator[Finished]:
        """Every group that is ``left`` as it finishes, by its number.

        ``asked`` is kept up to date: a finished group is taken out before it is handed out, one that is held has its
        responses so far in ``begun``. ``grows``: more may be added between two items; it is drawn beside the rest.
        Raises ``ClosedError`` once nothing is drawn any more.
        """
        left = asked.left
        while left:
            if self._closed:
                raise ClosedError
            for some in self._together(asked) if grows else self._ask(asked, list(left)):
                finished: Finished = []
                for number, group in some:
                    if self._partial and any(sample.held for sample in group.samples):
                        seeds = tuple(sample.seed for sample in group.samples)  # fewer where an engine lost one
                        left[number] = replace(left[number], seeds=seeds, begun=group.samples)
                    else:
                        del left[number]
                        finished.append((number, group))
                if finished:
                    yield finished
            if left:
                asked.times_held += 1
                self._wait()

    def _ask(self, asked: Asked, numbers: Sequence[int]) -> Iterator[Finished]:
        """The groups of ``numbers`` as they come, until they have ended or are held."""
        for some in self._source.stream([self._now(asked.left[number], asked) for number in numbers]):
            yield [(numbers[i], group) for i, group in some]

    def _together(self, asked: Asked) -> Iterator[Finished]:
        """All groups as they come, also those that are added meanwhile."""
        streams: Merged[Finished] = Merged()
        known: set[int] = set()
        while True:
            if more := [number for number in asked.left if number not in known]:
                known.update(more)
                streams.add(self._ask(asked, more))
            some = streams.next()
            if some is None:
                return
            yield some

    def _now(self, request: GenerateRequest, asked: Asked) -> GenerateRequest:
        """What is drawn of a request with the weights in force."""
        if not self._by_count:
            return request
        return replace(request, pause_at=-(-request.max_new_tokens * (asked.times_held + 1) // (asked.updates + 1)))

    def settle(self) -> None:
        """Return when nothing is drawn, and until ``release`` nothing is: only then may weights change."""
        with self._changed:
            self._settled = True
        self._until_idle(end=self._partial and not self._by_count)

    def release(self) -> None:
        """Let what is held go on."""
        with self._changed:
            self._settled = False
            self._releases += 1
            self._add(self._waiting)  # here and not in their threads, so that the next update cannot overtake them
            self._waiting = 0

    def close(self) -> None:
        """End what is being drawn, and draw nothing any more. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._until_idle(end=True)

    def seconds(self) -> float:
        """Seconds in which samples were drawn and verified since this was last asked; nothing may be under way."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _wait(self) -> None:
        """Until the next weights are in force."""
        with self._changed:
            if self._closed:
                raise ClosedError
            if not (self._settled or self._by_count):
                return
            self._add(-1)
            self._waiting += 1
            before = self._releases
            self._changed.wait_for(lambda: self._closed or self._releases != before)
            if self._releases == before:
                self._waiting -= 1
                self._add(1)
                raise ClosedError

    def _until_idle(self, *, end: bool) -> None:
        """Wait for every thread; with ``end``, end what they draw until none draws."""
        while True:
            with self._changed:
                if not self._active:
                    return
            if end:
                with suppress(EngineError):  # an engine that has died; its streams say so
                    self._source.abort()
            with self._changed:
                self._changed.wait_for(lambda: not self._active, _AGAIN_S if end else None)

    def _add(self, threads: int) -> None:
        """More, or fewer, are active."""
        now = time.monotonic()
        if self._active:
            self._seconds += now - self._since
        self._since = now
        self._active += threads
        self._changed.notify_all()
