"""What every process is told of one weight update, and what an engine's ranks answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipeline.model import architecture
from pipeline.model.grid import Grid
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.plan import Plan, make_plan


@dataclass(frozen=True)
class PlanInputs:
    """All that a plan follows from. Every process makes the plan for itself."""

    model_path: str  # a Hugging Face folder that every process can read
    learner: Grid
    engines: EngineGrid
    placement: Placement
    bucket_bytes: int
    dtype: str  # a key of ``plan.ITEM_SIZES``

    def plan(self) -> Plan:
        """The plan, made once in a process.

        Raises what ``make_plan`` raises, and ``ModelError`` on the folder.
        """
        return _plan(self)

    def engine_ranks(self, engine: int) -> range:
        """One engine's ranks, numbered over all engines."""
        return range(engine * self.engines.tp, (engine + 1) * self.engines.tp)

    def engine_members(self, engine: int) -> list[int]:
        """The same among the members of an update, see ``Placement.members``."""
        return [self.placement.learners + rank for rank in self.engine_ranks(engine)]


@lru_cache(maxsize=2)
def _plan(inputs: PlanInputs) -> Plan:
    model = architecture.read(Path(inputs.model_path))
    return make_plan(model, inputs.learner, inputs.engines, inputs.placement, inputs.bucket_bytes, inputs.dtype)


@dataclass(frozen=True)
class Probe:
    """Tokens, and the learner's log-probs of all but the first at T=1, nats."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True)
class Order:
    """One weight update, the same words for every process that takes part."""

    number: int  # of the update in this run; never used twice
    version: int  # of the weights
    inputs: PlanInputs
    plan_digest: str  # of the plan that the driver made
    store: tuple[str, int]  # host and port of the TCPStore where the processes meet
    generation: int  # of the process group: a new one is formed when a process is in another
    timeout_s: float  # for meeting and moving the bytes
    backend: str = "gloo"  # or "nccl": between GPUs, none of which is two processes' of the plan
    probe: Probe | None = None  # in the first update after a start: what the engine must then compute


@dataclass(frozen=True)
class Report:
    """What one rank of an engine says after an update."""

    process: int  # of the plan
    version: int
    received_bytes: int  # of weights, from other processes
    seconds: float
    error: str = ""  # "": everything arrived, and every digest of what was written agrees with its sender's
