"""From raw entropy readings to the value a law acts on."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from pipeline.entropy.state import Count, Stateful
from pipeline.smoothing import ema

if TYPE_CHECKING:  # it imports torch, which a check of the configuration does without
    from pipeline.types import EntropyReading

FLOOR = 1e-3  # nats; below it ln H would amplify noise without bound
HAMPEL_WINDOW = 7
_MIN_HISTORY = 4  # readings before an outlier can be told from a trend
_SCALE = 4 * 1.4826  # four standard deviations, the deviation estimated from the median absolute one
_OFFSET_WEIGHT = 0.05  # of a pair of readings in the offset between them, once there have been 20
_SLACK = 0.02  # of the median: lets a noiseless signal move


def usable(reading: EntropyReading) -> bool:
    """Whether a reading can be acted on: finite, not negative, of at least one token."""
    return math.isfinite(reading.mean) and reading.mean >= 0


class Sensor(Stateful):
    """Hampel filter, then exponential mean; where there is a repeated reading, that one, brought to the level of the
    others or as it is.

    Args:
        ema: weight of the past in the mean; 0: none.
        window: readings the Hampel filter compares with; 0: no filter. A reading further from their median than four
            robust standard deviations plus 2 % of the median is pulled back to that distance.
        of_repeated: take repeated readings as they are, so that the step's own prompts move nothing.
    """

    STATE: ClassVar = {"recent": list[float], "value": float | None, "offset": float, "offsets": Count}

    def __init__(self, ema: float = 0.0, window: int = 0, *, of_repeated: bool = False) -> None:
        self._ema = ema
        self._window = window
        self._of_repeated = of_repeated
        self.recent: list[float] = []  # raw, oldest first
        self.value: float | None = None
        self.offset = 0.0  # mean of ln reading - ln repeated reading
        self.offsets = 0  # pairs of readings seen

    def controlled(self, reading: EntropyReading) -> float:
        """The reading that the band is of, not filtered; of a repeated one that was lost the last that was not."""
        return self.value if self._of_repeated and self.value is not None else reading.mean

    def filter(self, entropy: float, repeated: float | None = None) -> float:
        """The filtered entropy, at least ``FLOOR``.

        ``repeated``: of the same prompts and seeds as ever, see ``EntropyReading``.
        """
        clean = self._hampel(entropy)
        if self._window:
            self.recent = [*self.recent, entropy][-self._window :]
        if repeated is not None:
            self.value = repeated if self._of_repeated else self._shifted(max(clean, FLOOR), max(repeated, FLOOR))
        elif self.value is None or not self._of_repeated:  # else the last one holds: the step's own have another level
            self.value = ema(self.value, clean, self._ema)
        return max(self.value, FLOOR)

    def _shifted(self, entropy: float, repeated: float) -> float:
        self.offsets += 1
        weight = max(_OFFSET_WEIGHT, 1 / self.offsets)
        self.offset += weight * (math.log(entropy / repeated) - self.offset)
        return repeated * math.exp(self.offset)

    def _hampel(self, entropy: float) -> float:
        if len(self.recent) < _MIN_HISTORY:
            return entropy
        middle = median(self.recent)
        reach = _SCALE * median(abs(value - middle) for value in self.recent) + _SLACK * middle
        return min(max(entropy, middle - reach), middle + reach)
