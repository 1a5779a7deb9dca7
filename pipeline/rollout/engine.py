"""The contract of a rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline.types import EngineHealth, GenerateRequest, SampleGroup, WeightBucket


class EngineError(RuntimeError):
    """An engine could not do what was asked; the message names the engine, the operation and the remedy."""


class WeightUpdateError(EngineError):
    """A weight update failed; the engine serves nothing until a whole update succeeds."""


class RolloutEngine(Protocol):
    """Draws samples from the policy.

    Weights move in one lifecycle: ``begin_update(v)``, ``load_bucket`` for every bucket of version ``v``, ``commit_update(v)``.
    From ``begin_update`` until ``commit_update`` returns the engine generates nothing; if anything fails in between it keeps
    refusing (``EngineError``) until a later update commits. ``commit_update`` verifies what arrived before it returns.
    Every sample carries the version(s) of the weights that drew it, so a mixed or stale one can be recognised.
    """

    def start(self, hf_path: Path) -> None:
        """Bring the engine up with the weights of a Hugging Face folder, as version 0."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[SampleGroup]:
        """One group per request, in order; blocks until all are done."""

    def begin_update(self, version: int) -> None:
        """Pause, and mark the loaded weights as inconsistent."""

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Take one bucket; order is free, each must arrive once. Checks the bucket's version and checksum."""

    def commit_update(self, version: int) -> None:
        """Check that everything arrived, verify it, and serve ``version``. Raises ``WeightUpdateError``."""

    def abort(self) -> None:
        """End running requests; their samples come back with finish_reason "abort"."""

    def health(self) -> EngineHealth:
        """Never raises."""

    def close(self) -> None:
        """Stop and clean up everything ``start`` made. Idempotent."""
