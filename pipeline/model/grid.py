"""Which Megatron rank holds which part of which parameter, as pure data. No megatron here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.schema import LearnerConfig


@dataclass(frozen=True)
class Place:
    """One rank's coordinates: in the dense grid (tp, dp, pp) and, for experts, in the expert grid (etp, ep, edp)."""

    tp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


class StagesError(ValueError):
    """Layers that cannot be divided over a grid's stages and chunks."""

    def __init__(self, size: str, problem: str, remedy: str) -> None:
        """``size``: the field of ``Grid`` that does not fit."""
        super().__init__(size, problem, remedy)
        self.size, self.problem, self.remedy = size, problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


@dataclass(frozen=True)
class Grid:
    """Sizes of Megatron's parallel groups, ranks in megatron's default order (tp-cp-ep-dp-pp, innermost first).

    ``dp`` counts every replica of the dense parameters: groups of ``cp`` context-parallel ranks that share rows, times
    the replicas of those. Experts of the same ``tp * dp`` ranks of a stage are divided over ``ep`` groups, each expert
    over ``etp`` ranks. Raises ``ValueError`` where sizes do not fit together.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1  # model chunks per pipeline rank (interleaved schedule)
    ep: int = 1
    etp: int | None = None  # None: like tp, as in megatron
    first_stage_layers: int | None = None  # uneven pipelines: decoder layers of the first and last stage
    last_stage_layers: int | None = None
    cp: int = 1  # ranks that share each row; changes nothing about who holds which parameter

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "vpp", "ep", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.dp % self.cp:
            raise ValueError(
                f"cp={self.cp} does not divide the dp={self.dp} replicas, which count it: raise dp or lower cp"
            )
        if (self.tp * self.dp) % (self.ep * self.expert_tp):
            raise ValueError(
                f"ep={self.ep} x etp={self.expert_tp} does not divide the {self.tp * self.dp} ranks of a stage "
                f"(tp {self.tp} x dp {self.dp}): raise dp or lower ep"
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.dp * self.pp

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        """Replicas of every expert."""
        return self.tp * self.dp // (self.ep * self.expert_tp)

    def place(self, rank: int) -> Place:
        """Coordinates of a global rank."""
        stage, within = divmod(rank, self.tp * self.dp)
        return Place(
            tp=within % self.tp,
            dp=within // self.tp,
            pp=stage,
            etp=within % self.expert_tp,
            ep=within // self.expert_tp % self.ep,
            edp=within // (self.expert_tp * self.ep),
        )

    def dense_rank(self, tp: int, dp: int, pp: int) -> int:
        """Global rank at dense coordinates."""
        return tp + self.tp * (dp + self.dp * pp)

    def expert_rank(self, etp: int, ep: int, edp: int, pp: int) -> int:
        """Global rank at expert coordinates."""
        return etp + self.expert_tp * (ep + self.ep * (edp + self.expert_dp * pp))

    def chunks(self, layers: int) -> tuple[tuple[range, ...], ...]:
        """Global layer numbers of every model chunk, ``[stage][chunk]``.

        As megatron's ``get_transformer_layer_offset``.

        Raises ``StagesError`` where ``layers`` cannot be divided so.
        """
        ends = (self.first_stage_layers, self.last_stage_layers)
        named = sum(count or 0 for count in ends)
        middle = self.pp - sum(count is not None for count in ends)
        left = layers - named  # for the stages between
        if middle < 0 or (left < middle if middle else left) or left % max(1, middle):
            which = "pp" if not named else "first_stage_layers" if ends[0] else "last_stage_layers"
            given = f", of which first {ends[0]} and last {ends[1]}" if named else ""
            remedy = "choose a divisor, or set the layers of the first or last stage"
            if named:
                remedy = f"{left} are left for the {middle} other stages, alike: change it, or the number of stages"
            raise StagesError(which, f"{layers} layers cannot be divided over {self.pp} stages{given}", remedy)
        sizes = [left // max(1, middle)] * self.pp
        if ends[0] is not None:
            sizes[0] = ends[0]
        if ends[1] is not None:
            sizes[-1] = ends[1]
        if any(size % self.vpp for size in sizes):
            problem = f"stages of {sorted(set(sizes))} layers cannot be divided into vpp={self.vpp} chunks each"
            raise StagesError("vpp", problem, "use a divisor of them, or 1")
        spans: list[list[range]] = [[] for _ in sizes]
        start = 0
        for _ in range(self.vpp):  # chunk 0 of every stage, then chunk 1 of every stage, ...
            for stage, size in enumerate(sizes):
                spans[stage].append(range(start, start + size // self.vpp))
                start += size // self.vpp
        return tuple(tuple(chunks) for chunks in spans)

    def stages(self, layers: int) -> tuple[int, ...]:
        """Pipeline stage of every layer."""
        found = {layer: stage for stage, chunks in enumerate(self.chunks(layers)) for span in chunks for layer in span}
        return tuple(found[layer] for layer in range(layers))


# Every size of a grid and the key of ``learner`` that sets it; ``dp`` counts the ranks of a CP group as replicas too.
KEYS: Mapping[str, str] = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "dp": "data_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first_stage_layers": "num_layers_in_first_pipeline_stage",
    "last_stage_layers": "num_layers_in_last_pipeline_stage",
    "cp": "context_parallel_size",
}
_OPTIONAL = ("etp", "first_stage_layers", "last_stage_layers")  # 0 in a configuration: not given


def grid_of(layout: LearnerConfig) -> Grid:
    """The sizes that a configuration asks for. Raises ``ValueError`` where they do not fit together."""
    sizes = {name: getattr(layout, key) for name, key in KEYS.items()}
    given = {name: sizes[name] or None for name in _OPTIONAL}
    return Grid(**sizes | given | {"dp": sizes["dp"] * sizes["cp"]})
