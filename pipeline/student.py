"""Student's t, for intervals of means over few values."""

from __future__ import annotations

# Two-sided 95 %: for 1 to 10 degrees of freedom from any table, beyond by an approximation good to 0.01.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t95(degrees: int) -> float:
    """How many standard errors the half of a 95 % interval has, for ``degrees`` of freedom (at least 1)."""
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96 + 2.5 / degrees
