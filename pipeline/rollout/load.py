"""What an engine has in hand, when it is busy, and how fast it was: engines are dealt work by it."""

from __future__ import annotations

import threading

from pipeline.clock import Busy
from pipeline.types import GenerateRequest

_KEPT = 0.5  # of the speed known so far, when another share has ended


def work(request: GenerateRequest) -> int:
    """Tokens that a request may take: its prompt once, and its samples at their longest."""
    return len(request.prompt.token_ids) + len(request.seeds) * request.max_new_tokens


class Load:
    """One engine's; several threads may change it."""

    def __init__(self) -> None:
        self.busy = Busy()
        self.expected = 0  # tokens of what it was asked and has not finished
        self.speed: float | None = None  # tokens of one response per second; None: nothing is known
        self._lock = threading.Lock()

    def add(self, tokens: int) -> None:
        """Change what is in hand."""
        with self._lock:
            self.expected += tokens

    def learn(self, tokens: int, seconds: float) -> None:
        """Take in how long responses took.

        An engine decodes many responses at once, so that one response's own pace tells how fast the engine is. One with
        more in hand than others is slower by that, and is dealt less the next time.

        Args:
            tokens: of the longest response of each group, summed.
            seconds: from asking to the end of each group, summed.
        """
        if tokens and seconds:
            with self._lock:
                known = self.speed or tokens / seconds
                self.speed = _KEPT * known + (1 - _KEPT) * tokens / seconds
