"""Move the learner's weights into an engine, as one version, all or nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipeline.learner import Learner
from pipeline.rollout.engine import EngineError, RolloutEngine, WeightUpdateError
from pipeline.types import WeightBucket


@dataclass(frozen=True)
class SyncReport:
    """What one weight sync did."""

    version: int
    buckets: int
    bytes: int | None  # None: the buckets were opaque handles, whose size the driver does not know
    seconds: float


def push_weights(learner: Learner, engine: RolloutEngine, version: int) -> SyncReport:
    """Export, load, verify and serve ``version``.

    Raises ``WeightUpdateError`` naming the phase that failed; the engine then refuses to generate until a later push
    succeeds.
    """
    started = time.perf_counter()
    buckets, size, known = 0, 0, True
    phase = "begin_update"
    try:
        engine.begin_update(version)
        phase = "export"
        for bucket in learner.export_shards(version):
            phase = f"load_bucket {buckets + 1}"
            engine.load_bucket(bucket)
            # Over Ray a bucket is a handle whose bytes never come here.
            if isinstance(bucket, WeightBucket):
                size += sum(tensor.nbytes for tensor in bucket.tensors.values())
            else:
                known = False
            buckets += 1
            phase = f"export after bucket {buckets}"
        phase = "commit_update"
        engine.commit_update(version)
    except (EngineError, OSError, RuntimeError, ValueError) as error:
        raise WeightUpdateError(f"push of weight version {version} failed in {phase}: {error}") from error
    return SyncReport(version, buckets, size if known else None, time.perf_counter() - started)
