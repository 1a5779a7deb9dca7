"""An alert: raised by the engine of rules, held by an ``alert`` event, shown by sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Alert:
    """An alert that begins or ends."""

    rule: str
    severity: str  # info | warning | critical
    state: str  # begin | end
    # last one done; the one in progress where a fault, a stall or time began it: a resume there supersedes it
    step: int
    time: float  # Unix seconds
    reason: str  # at the beginning what is wrong and the remedy, at the end for how long it was so

    @property
    def begins(self) -> bool:
        """Whether the alert begins; else it ends."""
        return self.state == "begin"

    def to_dict(self) -> dict[str, Any]:
        """The fields of an ``alert`` event."""
        return dict(vars(self))

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Alert:
        """Read an alert from its event."""
        return cls(**{field.name: event[field.name] for field in fields(cls)})
