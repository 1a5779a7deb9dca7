"""The exponential moving average: one formula for the controllers, the alerts and the figures."""

from __future__ import annotations

import math

EMA = 0.8  # weight of the past


def ema(last: float | None, value: float, weight: float) -> float:
    """``weight * last + (1 - weight) * value``; ``value`` where there is no ``last`` yet (``None`` or NaN)."""
    return value if last is None or math.isnan(last) else weight * last + (1 - weight) * value
