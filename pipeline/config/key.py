"""A configuration key: its default, meaning, unit and permitted values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MOST = 10**9  # of an integer whose range names no upper limit


@dataclass(frozen=True)
class Range:
    """Permitted numbers: from ``low`` (excluded when ``open_low``) to ``high`` (excluded when ``open_high``)."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and abs(value) < math.inf

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {_number(self.low)}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {_number(self.high)}"


@dataclass(frozen=True)
class Form:
    """Texts that match ``pattern`` as a whole. ``problem`` and ``remedy`` are said of the others."""

    pattern: str
    problem: str
    remedy: str


ANY = Range(-math.inf)
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)
SHARE = Range(0, 1, open_high=True)
FRACTION = Range(0, 1, open_low=True)
SEED = Range(0, 2**63 - 1)


def key(
    default: Any,
    help: str,
    *,
    choices: Mapping[str, str] | Sequence[str] = (),
    range: Range | None = None,
    unit: str = "",
    form: Form | None = None,
    path: Literal["", "read", "written"] = "",
) -> Any:
    """A field of a configuration's dataclass, with all that one key says about its own values.

    Args:
        default: the value where none is given; ``omegaconf.MISSING`` where one must be given; or a section.
        help: what the key means.
        choices: permitted words, with meanings where the words do not say them. Of a list: those of its entries.
        range: permitted numbers. Of a list: those of its entries.
        unit: what a number counts or measures, e.g. "seconds".
        path: whether the text is a file or folder that is read, or one that is written; ``load`` finds it from the file
            that names it. What is read may be packaged.
        form: what texts look like; a text may be one of ``choices`` instead. Of a list: its entries.
    """
    words = dict(choices) if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    metadata = {"help": help, "choices": words, "range": range, "unit": unit, "form": form, "path": path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if hasattr(default, "__dataclass_fields__"):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
