"""What a controller must remember across a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, lt=2**31)]


class Stateful:
    """Saves and restores the attributes named in ``STATE`` (JSON values, by type) and those of its ``parts``."""

    STATE: ClassVar[Mapping[str, Any]] = {}

    def parts(self) -> dict[str, Stateful]:
        """Members that remember something themselves, by their name in the state."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, JSON-serialisable."""
        own = {name: msgspec.to_builtins(getattr(self, name)) for name in self.STATE}
        return own | {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken. Raises ``ValueError`` on other fields or types."""
        parts = self.parts()
        if not isinstance(state, dict) or set(state) != {*self.STATE, *parts}:
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            expected = sorted({*self.STATE, *parts})
            raise ValueError(f"controller state holds {found}, expected {expected}: it was written by another version")
        for name, kind in self.STATE.items():
            try:
                setattr(self, name, msgspec.convert(state[name], kind))
            except msgspec.ValidationError as error:
                raise ValueError(f"controller state {name}: {error}") from error
        for name, part in parts.items():
            part.load_state_dict(state[name])
