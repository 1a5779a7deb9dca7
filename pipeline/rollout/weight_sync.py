"""Moves the learner's weights into an engine, as one version, all or nothing."""

from __future__ import annotations

from pipeline.learner import Learner
from pipeline.rollout.engine import EngineError, RolloutEngine, WeightUpdateError


def push_weights(learner: Learner, engine: RolloutEngine, version: int) -> None:
    """Export, load, verify and serve ``version``; on any failure the update is aborted.

    Buckets are handed on unopened: over Ray they are handles whose bytes never come here. Raises ``WeightUpdateError``
    naming the phase that failed; the engine then refuses to generate until a later push succeeds.
    """
    phase = "begin_update"
    try:
        engine.begin_update(version)
        phase = "export"
        for number, bucket in enumerate(learner.export_shards(version), start=1):
            phase = f"load_bucket {number}"
            engine.load_bucket(bucket)
            phase = f"export after bucket {number}"
        phase = "verify_update"
        engine.verify_update(version)
        phase = "commit_update"
        engine.commit_update(version)
    except (EngineError, OSError, RuntimeError, ValueError) as error:
        engine.abort_update()
        raise WeightUpdateError(f"push of weight version {version} failed in {phase}: {error}") from error
