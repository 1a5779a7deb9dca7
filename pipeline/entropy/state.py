"""What a controller must remember across a restart."""

from __future__ import annotations

import copy
from typing import Any, ClassVar


class Stateful:
    """Saves and restores the attributes named in ``STATE`` (JSON values)."""

    STATE: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, JSON-serialisable."""
        return {name: copy.copy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken. Raises ``ValueError`` on other fields than its own."""
        if set(state) != set(self.STATE):
            raise ValueError(
                f"controller state holds {sorted(state)}, expected {sorted(self.STATE)}: it was written by another version"
            )
        for name in self.STATE:
            setattr(self, name, copy.copy(state[name]))
