"""Formats bytes, counts and seconds for a plan's text."""

from __future__ import annotations


def size(number: float) -> str:
    """A number of bytes in a unit that leaves few digits."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if number >= 2**power:
            return f"{number / 2**power:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"


def count(number: int, what: str) -> str:
    """A number and what it counts, in the plural where needed."""
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what}{'es' if what.endswith(('s', 'ch')) else 's'}"


def duration(length: float) -> str:
    """Seconds in a unit that leaves few digits."""
    if length < 120:
        return f"{length:,.1f} s"
    return f"{length / 60:,.1f} min" if length < 7200 else f"{length / 3600:,.1f} h"
