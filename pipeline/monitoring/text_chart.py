"""Draws line charts with characters: Braille dots, 2 x 4 to a cell, or asterisks where a terminal has only ASCII."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.style import Style
from rich.text import Text

BRAILLE = 0x2800
# Bit of each dot of a cell: row, column (Unicode block "Braille Patterns").
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], dtype=np.uint8)


@dataclass(frozen=True)
class Line:
    """A curve: steps and values [n] (NaN: a gap), and its style. Later lines are drawn over earlier ones."""

    steps: np.ndarray
    values: np.ndarray
    style: str


@dataclass(frozen=True)
class Area:
    """What lies between two curves: steps, low and high [n]. Where there is no colour it is shaded."""

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray
    style: str  # of the background


class TextChart:
    """A chart of ``columns`` x ``rows`` cells, its labels not counted, over the steps ``first`` to ``last``."""

    def __init__(self, columns: int, rows: int, first: int, last: int, *, ascii_only: bool, colour: bool) -> None:
        self.columns, self.rows = columns, rows
        self._first, self._span = first, max(1, last - first)
        self._ascii, self._colour = ascii_only, colour

    def draw(self, lines: Sequence[Line], area: Area | None = None) -> list[Text]:
        """One text per row, the scale on its left (``LABEL`` wide), the highest value on top."""
        low, high = _limits(lines, area)
        bits = np.zeros((self.rows, self.columns), np.uint8)
        styles = np.full((self.rows, self.columns), "", object)
        for line in lines:
            self._trace(line, low, high, bits, styles)
        inside = self._inside(area, low, high) if area else np.zeros_like(bits, bool)
        labels = {0: f"{high:.3g}", self.rows - 1: f"{low:.3g}"}
        if self.rows > 4:
            labels[self.rows // 2] = f"{high - (high - low) * (self.rows // 2 + 0.5) / self.rows:.3g}"
        return [
            Text.assemble(
                (labels.get(row, "").rjust(LABEL - 1) + " ", "dim"), *self._cells(row, bits, styles, inside, area)
            )
            for row in range(self.rows)
        ]

    def place(self, steps: np.ndarray) -> np.ndarray:
        """The column of each step."""
        return ((np.asarray(steps) - self._first) * (self.columns - 1) / self._span).round().astype(int)

    def _trace(self, line: Line, low: float, high: float, bits: np.ndarray, styles: np.ndarray) -> None:
        x = (line.steps - self._first) * (2 * self.columns - 1) / self._span
        y = (high - line.values) / (high - low) * (4 * self.rows - 1)
        known = np.isfinite(y)
        for i in np.flatnonzero(known):
            joined = i + 1 < len(known) and known[i + 1]
            count = int(max(abs(x[i + 1] - x[i]), abs(y[i + 1] - y[i]))) + 2 if joined else 1
            across = np.linspace(x[i], x[i + 1] if joined else x[i], count).round().astype(int)
            down = np.linspace(y[i], y[i + 1] if joined else y[i], count).round().astype(int).clip(0, 4 * self.rows - 1)
            for column, row in zip(across.tolist(), down.tolist(), strict=True):
                bits[row // 4, column // 2] |= DOTS[row % 4, column % 2]
                styles[row // 4, column // 2] = line.style

    def _inside(self, area: Area, low: float, high: float) -> np.ndarray:
        """Which cells the area covers; where it is thinner than a cell, the one it lies in."""
        steps = self._first + np.arange(self.columns) * self._span / max(1, self.columns - 1)
        height = (high - low) / self.rows
        top = ((high - np.interp(steps, area.steps, area.high)) / height).round()
        bottom = np.maximum(((high - np.interp(steps, area.steps, area.low)) / height).round() - 1, top)
        rows = np.arange(self.rows)[:, None]
        return (rows >= top) & (rows <= bottom)

    def _cells(
        self, row: int, bits: np.ndarray, styles: np.ndarray, inside: np.ndarray, area: Area | None
    ) -> list[tuple[str, Style]]:
        cells = []
        for column in range(self.columns):
            covered, mask = bool(inside[row, column]), int(bits[row, column])
            style = Style.parse(styles[row, column] or "none")
            if covered and area is not None and self._colour:
                style += Style.parse(f"on {area.style}")
            blank = (":" if self._ascii else "░") if covered and not self._colour else " "
            drawn = "*" if self._ascii else chr(BRAILLE + mask)
            cells.append((drawn if mask else blank, style))
        return cells


LABEL = 7  # characters that the scale takes


def _limits(lines: Sequence[Line], area: Area | None) -> tuple[float, float]:
    """Lowest and highest value shown, with some air."""
    values = np.concatenate([*(line.values for line in lines), *((area.low, area.high) if area else ())])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - air) if low >= 0 else low - air, high + air
