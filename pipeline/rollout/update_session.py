"""Keeps the books of one weight update, for every kind of engine: what has happened, and so what may come next."""

from __future__ import annotations

from pipeline.reshard.order import Order
from pipeline.rollout.engine import WeightUpdateError


class UpdateSession:
    """Begun, then received, then verified, then committed; any other order raises ``WeightUpdateError``."""

    def __init__(self, engine: str, version: int) -> None:
        self.version = version
        self._engine = engine
        self.order: Order | None = None  # once all of it has arrived
        self._verified = False

    def expects(self, order: Order) -> None:
        """Check that ``order`` is the one to receive now."""
        if order.version != self.version:
            raise self._error(f"receive of version {order.version}; finish or restart the update of {self.version}")
        if self.order is not None:
            raise self._error("receive for a second time")

    def received(self, version: int) -> Order:
        """What was received, which must be ``version``."""
        if version != self.version:
            raise self._error(f"verify_update({version}) while version {self.version} is being loaded")
        if self.order is None:
            raise self._error("verify_update before anything was received")
        return self.order

    def verified(self) -> None:
        """What arrived has been verified."""
        self._verified = True

    def commit(self, version: int) -> None:
        """Check that ``version`` is what has been verified."""
        if version != self.version or not self._verified:
            state = "verified" if self._verified else "not verified yet"
            raise self._error(f"commit_update({version}), but what is loaded is version {self.version}, {state}")

    def _error(self, what: str) -> WeightUpdateError:
        return WeightUpdateError(f"{self._engine}: update to version {self.version}: {what}")


def opened(session: UpdateSession | None, engine: str, operation: str) -> UpdateSession:
    """``session``, which ``operation`` needs. Raises ``WeightUpdateError`` where no update is in progress."""
    if session is None:
        raise WeightUpdateError(f"{engine}: {operation} outside an update; call begin_update (again) first")
    return session
