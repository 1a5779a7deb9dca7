"""Asks engines for the turns of many episodes, together: one turn alone would leave an engine nearly idle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from pipeline.rollout.engine import Finished
from pipeline.types import GenerateRequest, Sample

PATIENCE_S = 0.02  # how long turns wait for those of other episodes, which come over the network


class Turns:
    """Single turns, gathered to waves.

    A wave begins when every episode that plays waits for its turn, and so is the same whatever the machine's speed; or
    after ``patience_s``, where an episode may be busy elsewhere. Its turns are in the order of their prompts and seeds.

    Args:
        stream: draws requests, see ``Rollouts.stream``.
        patience_s: longest wait for other episodes; ``math.inf``: until all wait.
        together: waves at a time.
    """

    def __init__(
        self, stream: Callable[[Sequence[GenerateRequest]], Iterator[Finished]], *, patience_s: float, together: int
    ) -> None:
        self._stream, self._patience_s = stream, patience_s
        self._waves = ThreadPoolExecutor(together, "turns")
        self._changed = threading.Condition()
        self._asked: list[tuple[GenerateRequest, Future[Sample]]] = []
        self._playing = self._drawing = 0  # episodes; those of them whose turn is being drawn
        self._free = together
        self._closed = False
        self.failed: BaseException | None = None  # what an engine raised: no fault of any episode
        self._thread = threading.Thread(target=self._gather, name="turns", daemon=True)
        self._thread.start()

    @contextmanager
    def playing(self, episodes: int) -> Iterator[Callable[[], None]]:
        """Within, so many episodes ask for turns; each calls what this gives when it has ended."""
        left = episodes

        def ended() -> None:
            nonlocal left
            with self._changed:
                left -= 1
                self._playing -= 1
                self._changed.notify()

        with self._changed:
            self._playing += episodes
        try:
            yield ended
        finally:
            with self._changed:
                self._playing -= left
                self._changed.notify()

    def ask(self, request: GenerateRequest) -> Future[Sample]:
        """The one sample of ``request``, once it is drawn."""
        future: Future[Sample] = Future()
        with self._changed:
            if self.failed is not None:
                future.set_exception(self.failed)
                return future
            self._asked.append((request, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Begin no further wave. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._waves.shutdown(cancel_futures=True)

    def _gather(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._asked and self._free))
                if self._closed:
                    return
                deadline = time.monotonic() + min(self._patience_s, threading.TIMEOUT_MAX)
                self._changed.wait_for(self._complete, max(0.0, deadline - time.monotonic()))
                wave = [asked for asked in self._asked if asked[1].set_running_or_notify_cancel()]
                self._asked = []
                self._drawing += len(wave)
                self._free -= bool(wave)
            if wave:
                wave.sort(key=lambda asked: (asked[0].role, asked[0].prompt.id, asked[0].seeds))
                self._waves.submit(self._draw, wave)

    def _complete(self) -> bool:
        return self._closed or len(self._asked) + self._drawing >= self._playing

    def _draw(self, wave: Sequence[tuple[GenerateRequest, Future[Sample]]]) -> None:
        left = len(wave)
        try:
            for some in self._stream([request for request, _ in wave]):
                for number, group in some:
                    wave[number][1].set_result(group.samples[0])
                with self._changed:
                    left -= len(some)
                    self._drawing -= len(some)
                    self._changed.notify()
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            with self._changed:
                self.failed = error
            for _, future in wave:
                if not future.done():
                    future.set_exception(error)
        finally:
            with self._changed:
                self._drawing -= left
                self._free += 1
                self._changed.notify()
