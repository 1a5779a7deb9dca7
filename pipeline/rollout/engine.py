"""The contract of a rollout engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.reshard.order import Order
from pipeline.types import EngineHealth, GenerateRequest, SampleGroup


class EngineError(RuntimeError):
    """An engine could not do what was asked; the message names the engine, the operation and the remedy."""


class EngineTimeoutError(EngineError):
    """An engine did not answer in the time it had."""


class WeightUpdateError(EngineError):
    """A weight update failed; the engine serves nothing until a whole update succeeds."""


# Groups that are finished, each with the position of its request among those that were asked.
Finished = list[tuple[int, SampleGroup]]


def in_order(finished: Iterable[Finished], count: int) -> list[SampleGroup]:
    """The groups of ``count`` requests in the order of the requests, once all are finished."""
    groups = dict(pair for some in finished for pair in some)
    return [groups[number] for number in range(count)]


class RolloutEngine(Protocol):
    """Draws samples from the policy.

    Weights move in two phases. First everything arrives and is verified: ``begin_update(v)``, ``receive`` of an order
    of version ``v`` while the learner's ranks send it, ``verify_update(v)``. Then ``commit_update(v)`` only lets the
    engine continue. Whoever drives several engines verifies all of them before it commits any (``EnginePool``), so none
    serves ``v`` until all have it. From ``begin_update`` until ``commit_update`` returns the engine hands out nothing.
    When anything fails in between, its driver calls ``abort_update`` (``WeightSync`` does), and the engine keeps
    refusing (``EngineError``) until a later update commits. A phase that takes longer than
    ``rollout.weight_sync_timeout_s`` raises ``WeightUpdateError``; an engine that an operation was stuck in is then not
    alive, so that it is started again. Every sample carries the version(s) of the weights that drew it, so a mixed or
    stale one can be recognised.
    """

    def start(self, hf_path: Path) -> None:
        """Bring the engine up with the weights of a Hugging Face folder, as version 0."""

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """Every group, some at a time, as they finish. Several calls may run at once, each in a thread of its own.

        A request's ``begun`` responses, all of them held, go on where they are; handed out is only what is new of them.
        ``pause_at`` is nothing to an engine (``pipeline.rollout.parts``).
        """
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[SampleGroup]:
        """One group per request, in order; blocks until all are done."""
        return in_order(self.stream(requests), len(requests))

    def release(self) -> None:
        """Free the GPU memory that it shares with the learner, weights and all, until the next update.

        For ``rollout.placement=colocated``. The engine serves nothing until that update commits. Idle engines only;
        idempotent.
        """

    def begin_update(self, version: int) -> None:
        """Pause, and mark the loaded weights as inconsistent."""

    def receive(self, order: Order, engine: int = 0) -> None:
        """Take what the learner's ranks send, as engine number ``engine`` of the order's plan.

        Raises ``WeightUpdateError`` unless every byte arrived and is what was sent.
        """

    def verify_update(self, version: int) -> None:
        """Check that the engine computes with what arrived; it stays paused. Raises ``WeightUpdateError``."""

    def commit_update(self, version: int) -> None:
        """Serve ``version``, which must have been verified. Raises ``WeightUpdateError``."""

    def abort_update(self) -> None:
        """Drop the update in progress, if any, and serve nothing until a later one commits.

        Never raises, never waits long.
        """

    def abort(self) -> None:
        """End running requests; their samples come back as far as they are, with finish_reason "abort"."""

    def health(self) -> EngineHealth:
        """Never raises."""

    def close(self) -> None:
        """Stop and clean up everything ``start`` made. Idempotent."""
