"""What each SGLang rank holds of each Hugging Face tensor, and which node each rank runs on. Pure data, no sglang here.

The rules are SGLang's own (0.5.21, under ``sglang/srt``):

- embedding and output layer: vocabulary padded to a multiple of 64, then divided
  (``layers/vocab_parallel_embedding.py``);
- query heads divided, key-value heads divided or, where ranks outnumber them, each held by several neighbouring ranks
  (``layers/linear.py``, ``QKVParallelLinear``); output and feed-forward projections divided (same file);
- experts: neighbouring experts on each of ``ep`` groups of ``tp / ep`` neighbouring ranks, which share every expert
  (``layers/moe/fused_moe_triton/layer.py``, ``FusedMoE``; ``layers/moe/ep_moe/layer.py`` divides alike);
- norms, routers and the low-rank projections of latent attention: whole on every rank (``ReplicatedLinear``,
  ``RMSNorm``).

Assumed: no attention data parallelism, and DeepSeek's shared experts not fused (``--disable-shared-experts-fusion``).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.model.architecture import VOCAB_MULTIPLE, Architecture
from pipeline.model.layout import Row
from pipeline.units import round_up


@dataclass(frozen=True)
class EngineGrid:
    """``count`` engines of ``tp`` ranks, each of which divides experts over ``ep`` groups.

    Raises ``ValueError`` on a size below 1; ``check`` holds them against a model.
    """

    tp: int = 1
    ep: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def world_size(self) -> int:
        """Ranks of all engines."""
        return self.tp * self.count

    def expert_group(self, expert: int, experts: int) -> int:
        """Which of the ``ep`` groups holds an expert."""
        return expert // (experts // self.ep)

    def interval(self, row: Row, source: int, experts: int, rank: int) -> range:
        """Entries of a source of ``row``, along ``row.dim``, that a rank of an engine holds.

        ``experts``: of the model.
        """
        length = row.sources[source].shape[row.dim]
        if row.expert is not None:
            share = self.tp // self.ep
            if self.expert_group(row.expert, experts) != rank // share:
                return range(0)
            return _part(length, share, rank % share)
        if row.split is None:
            return range(length)
        if row.layer is None:  # embedding, output layer
            part = _part(round_up(length, VOCAB_MULTIPLE), self.tp, rank)
            return range(min(part.start, length), min(part.stop, length))
        if row.groups and source > 0 and self.tp > row.groups:  # key and value heads, fewer than ranks
            return _part(length, row.groups, rank * row.groups // self.tp)
        return _part(length, self.tp, rank)

    def check(self, model: Architecture) -> None:
        """Raise ``ValueError`` where SGLang would refuse to divide ``model`` so."""
        for _, problem in model.engine_limits(self.tp, self.ep):
            raise ValueError(problem)


@dataclass(frozen=True)
class Placement:
    """Which process each rank is, and on which node.

    Colocated: engine rank ``i`` is the process (GPU) of learner rank ``i``.

    Node 0 is the driver's.
    """

    learners: int  # ranks; processes 0 .. learners - 1
    engines: int  # ranks; processes from 0 (colocated) or from ``learners`` on
    colocated: bool
    nodes: tuple[int, ...]  # by process

    def __post_init__(self) -> None:
        if self.colocated and self.engines > self.learners:
            raise ValueError(
                f"{self.engines} colocated engine ranks need as many learner ranks, there are {self.learners}: "
                "lower the number of engines or their tp, or place them on GPUs of their own"
            )
        if len(self.nodes) != self.world_size:
            raise ValueError(f"the node map names {len(self.nodes)} processes, there are {self.world_size}")

    @classmethod
    def consecutive(cls, learners: int, engines: int, colocated: bool, gpus_per_node: int = 8) -> Placement:
        """Processes fill nodes in order, learners first."""
        world = learners if colocated else learners + engines
        return cls(learners, engines, colocated, tuple(process // gpus_per_node for process in range(world)))

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.learners if self.colocated else self.learners + self.engines

    @property
    def learner_nodes(self) -> tuple[int, ...]:
        """The node of each learner rank."""
        return self.nodes[: self.learners]

    def engine_nodes(self, size: int) -> tuple[int, ...]:
        """The node of each engine's first rank; an engine has ``size`` ranks."""
        return tuple(self.nodes[self.engine_process(rank)] for rank in range(0, self.engines, size))

    @property
    def members(self) -> int:
        """Who takes part in an update: every learner rank, then every engine rank. Colocated ones share a process of
        the plan, apart each has its own, of the same number."""
        return self.learners + self.engines

    def engine_process(self, rank: int) -> int:
        """Process of an engine rank (numbered over all engines)."""
        return rank if self.colocated else self.learners + rank


def _part(length: int, parts: int, index: int) -> range:
    return range(length // parts * index, length // parts * (index + 1))
