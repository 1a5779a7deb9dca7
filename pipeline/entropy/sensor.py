"""From raw entropy readings to the value a law acts on."""

from __future__ import annotations

import math
from statistics import median

from pipeline.entropy.state import Stateful
from pipeline.types import EntropyReading

FLOOR = 1e-3  # nats; below it ln H would amplify noise without bound
HAMPEL_WINDOW = 7
_MIN_HISTORY = 4  # readings before an outlier can be told from a trend
_SCALE = 4 * 1.4826  # four standard deviations, the deviation estimated from the median absolute one
_SLACK = 0.02  # of the median: lets a noiseless signal move


def usable(reading: EntropyReading) -> bool:
    """Whether a reading can be acted on: finite, not negative, of at least one token."""
    return math.isfinite(reading.mean) and reading.mean >= 0


class Sensor(Stateful):
    """Hampel filter, then exponential mean.

    Args:
        ema: weight of the past in the mean; 0: none.
        window: readings the Hampel filter compares with; 0: no filter. A reading further from their median than four
            robust standard deviations plus 2 % of the median is pulled back to that distance.
    """

    STATE = ("recent", "value")

    def __init__(self, ema: float = 0.0, window: int = 0) -> None:
        self._ema = ema
        self._window = window
        self.recent: list[float] = []  # raw, oldest first
        self.value: float | None = None

    def filter(self, entropy: float) -> float:
        """The filtered entropy, at least ``FLOOR``."""
        clean = self._hampel(entropy)
        if self._window:
            self.recent = [*self.recent, entropy][-self._window :]
        self.value = clean if self.value is None else self._ema * self.value + (1 - self._ema) * clean
        return max(self.value, FLOOR)

    def _hampel(self, entropy: float) -> float:
        if len(self.recent) < _MIN_HISTORY:
            return entropy
        middle = median(self.recent)
        reach = _SCALE * median(abs(value - middle) for value in self.recent) + _SLACK * middle
        return min(max(entropy, middle - reach), middle + reach)
