"""Predicts the seconds of a step on a cluster's GPUs, phase by phase, and of the whole run.

Estimates at stated speeds, not measurements.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from launchers.plan import memory
from launchers.plan.engines import Gpu, Rollout, rollout
from launchers.plan.speed import Machine, speed
from launchers.plan.work import ITEM_SIZES, Work, from_config
from launchers.slurm.cluster import ClusterConfig
from pipeline.config.schema import RunConfig
from pipeline.model.architecture import Architecture
from pipeline.model.layout import rows
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.pieces import INTER
from pipeline.reshard.plan import make_plan
from pipeline.reshard.report import predicted_seconds
from pipeline.units import GIB

ENGINE_CONTEXT_GIB = 3.0  # of an engine that has released its memory: CUDA context, libraries, NCCL; as the learner's
CHECKPOINT_BYTES = {"fp32": 12, "bf16": 14}  # of a parameter: itself, Adam's two moments, bf16's float32 original


@dataclass(frozen=True)
class Sync:
    """Seconds and bytes of moving one version of the weights from learner to engines."""

    model_bytes: int  # one copy
    node_bytes: int  # that enter the busiest node from others
    seconds: float


@dataclass(frozen=True)
class Saving:
    """Seconds and bytes of one checkpoint, which is written while the run goes on."""

    node_bytes: int  # that the node with most learner ranks copies into its memory, then writes
    seconds: float


@dataclass(frozen=True)
class Memory:
    """GiB of the fullest GPU of each kind, in the phase in which it is fullest."""

    learner: float
    engine: float  # what it takes for weights and cache; colocated: beside the learner's ``steady``
    steady: float  # what the learner keeps between updates
    together: float  # colocated: the fullest of generating, training and weight sync; else 0


@dataclass(frozen=True)
class Forecast:
    """The predicted seconds and memory of one step.

    ``rollouts`` is None where engines compute on the CPU: they, and the whole step, are then not estimated.
    """

    work: Work
    memory: Memory
    rollouts: Rollout | None
    train_seconds: float
    sync: Sync
    saving: Saving

    @property
    def step_seconds(self) -> float | None:
        """Seconds of rollouts, training and weight sync, one after the other."""
        return None if self.rollouts is None else self.rollouts.seconds + self.train_seconds + self.sync.seconds


def forecast(
    model: Architecture, config: RunConfig, cluster: ClusterConfig, placed: Placement, mean_response: int
) -> Forecast:
    """Predict one step of a run whose processes are ``placed``.

    Seconds are for responses of ``mean_response`` tokens, memory for the longest.

    Raises ``ValueError`` where the model cannot be cut as learner or engines ask.
    """
    work = from_config(model, config, mean_response=mean_response)
    stages = memory.stages(from_config(model, config))
    steady = max(stage.steady for stage in stages) / GIB
    learner = max(stage.total for stage in stages) / GIB
    colocated = config.rollout.colocated
    # An engine starts when the learner has all but Adam's moments, which come with the first update.
    before = max(stage.parts["parameters"] + stage.parts["gradients"] + stage.parts["context"] for stage in stages)
    free = cluster.gpu_gib - (before / GIB if colocated else 0.0)
    drawn = None
    if config.rollout.engine == "sglang":
        gpu = Gpu(cluster.gpu_gib, cluster.gpu_tflops, cluster.gpu_memory_gb_s)
        drawn = rollout(model, config, gpu, free, mean_response)
    engine = config.rollout.sglang.mem_fraction_static * free if drawn else 0.0
    # In a weight sync the engine has its weights again, but no cache yet.
    syncing = (max(stage.steady + stage.sync for stage in stages) + (drawn.weights_bytes if drawn else 0.0)) / GIB
    together = max(steady + engine, syncing, learner) + ENGINE_CONTEXT_GIB if colocated else 0.0
    return Forecast(
        work=work,
        memory=Memory(learner, engine, steady, together),
        rollouts=drawn,
        train_seconds=speed(work, Machine(cluster.gpu_tflops)).seconds,
        sync=_sync(model, config, cluster, work, placed),
        saving=_saving(checkpoint_bytes(model, config), cluster, placed),
    )


def checkpoint_bytes(model: Architecture, config: RunConfig) -> int:
    """Bytes of one checkpoint: weights, optimizer and, with ``objective.kl_coef``, the reference policy."""
    parameters = sum(row.entries for row in rows(model))
    reference = ITEM_SIZES[config.model.dtype] if config.objective.kl_coef > 0 else 0
    return parameters * (CHECKPOINT_BYTES[config.model.dtype] + reference)


def _saving(whole: int, cluster: ClusterConfig, placed: Placement) -> Saving:
    """Ranks write alike much, for those that hold the same divide it."""
    most = max(Counter(placed.nodes[: placed.learners]).values())
    node_bytes = whole * most // placed.learners
    return Saving(node_bytes, node_bytes / cluster.disk_gb_s / 1e9)


def _sync(model: Architecture, config: RunConfig, cluster: ClusterConfig, work: Work, placed: Placement) -> Sync:
    """What the reshard plan moves, bucket after bucket. What stays on a GPU that both share takes no time."""
    settings = config.rollout
    tp = settings.tensor_parallel_size if settings.engine == "sglang" else 1
    engines = EngineGrid(tp=tp, count=settings.engines)
    dtype = "fp8" if settings.weight_dtype == "fp8" else config.model.dtype
    plan = make_plan(model, work.grid, engines, placed, config.learner.bucket_bytes, dtype)
    traffic = plan.traffic()
    into_nodes = np.bincount(placed.nodes, weights=traffic[INTER, 1].sum(0))
    seconds = predicted_seconds(traffic, cluster.gpu_network_gb_s, cluster.gpu_link_gb_s)
    return Sync(plan.bounds.full, int(into_nodes.max()), seconds)
