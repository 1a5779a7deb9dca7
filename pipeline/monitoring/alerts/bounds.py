"""The limit in an alert rule: a number, a metric, or a multiple of a metric."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """``factor * metric``, or ``factor`` alone."""

    factor: float
    metric: str = ""

    def value(self, figures: Mapping[str, float]) -> float | None:
        """None where the metric has no value."""
        if not self.metric:
            return self.factor
        found = figures.get(self.metric)
        return None if found is None else self.factor * found

    def __str__(self) -> str:
        if not self.metric:
            return f"{self.factor:g}"
        return self.metric if self.factor == 1 else f"{self.factor:g} * {self.metric}"


def parse_bound(text: str) -> Bound | None:
    """A number, a metric, or ``number * metric``; None for an empty text. Raises ``ValueError``."""
    if not text:
        return None
    left, star, right = (part.strip() for part in text.partition("*"))
    if star:
        return Bound(float(left), _metric(right))
    try:
        return Bound(float(left))
    except ValueError:
        return Bound(1.0, _metric(left))


def _metric(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", text):
        raise ValueError(f"{text!r} is no metric name")
    return text
