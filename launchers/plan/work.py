"""The work of one learner rank in a step: its layout, its micro-batches, their tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.schema import EntropyConfig, LearnerConfig, RunConfig
from pipeline.entropy.actuator import acting
from pipeline.model.architecture import Architecture
from pipeline.model.grid import Grid, grid_of
from pipeline.model.layout import Row, rows
from pipeline.model.lora import Adapter, adapters
from pipeline.units import round_up

ITEM_SIZES = {"fp32": 4, "bf16": 2}
# Of ``rollout.max_new_tokens``: the length of an average response where nobody states one. An assumption, not a
# measurement: about 2,500 tokens at a limit of 8,192.
EXPECTED_SHARE = 0.3


@functools.lru_cache(maxsize=64)
def table(model: Architecture, grid: Grid) -> tuple[tuple[Row, ...], ...]:
    """``layout.rows`` by pipeline stage, made once: a mixture of experts has tens of thousands."""
    stages: list[list[Row]] = [[] for _ in range(grid.pp)]
    for row in rows(model, grid):
        stages[row.stage].append(row)
    return tuple(map(tuple, stages))


@dataclass(frozen=True)
class Work:
    """One learner and the rows of one step.

    Sizes are the largest that the configuration permits, ``mean_*`` what is expected.
    """

    model: Architecture
    learner: LearnerConfig
    grid: Grid  # its dp counts context-parallel ranks too
    itemsize: int  # bytes of a parameter, hence of an activation
    rows: float  # of one micro-batch, each of ``length`` tokens
    length: int  # tokens of the longest row, as the model reads it
    targets: float  # response tokens of one micro-batch
    micro_batches: int  # of one optimizer step, per data-parallel rank
    step_rows: int  # of a whole step, over all replicas
    passes: int = 0  # forward passes over a step's rows beside training's (log_probs)
    reference: bool = False  # a copy of the starting policy is kept
    mean_length: float = 0.0  # tokens; 0: as ``length``
    mean_targets: float = 0.0  # response tokens of a row; 0: ``targets`` / ``rows``
    imbalance: float = 1.0  # tokens of the busiest expert-parallel rank, over the mean
    colocated: bool = False  # engines share its GPUs

    @property
    def transformer_engine(self) -> bool:
        """Whose layers: ``auto`` is Transformer Engine's here, since what is planned for has GPUs."""
        return self.learner.transformer_impl != "local"

    @functools.cached_property
    def adapters(self) -> Mapping[str, Adapter]:
        """By the parameter that each is of; none where all weights are trained."""
        return {each.base.parameter: each for each in adapters(self.model, self.grid, self.learner.lora)}

    @functools.cached_property
    def layer_adapters(self) -> Mapping[int | None, list[Adapter]]:
        """By layer, those that one rank holds: of experts, the first expert-parallel rank's."""
        found: dict[int | None, list[Adapter]] = {}
        for each in self.adapters.values():
            if not each.base.ep:
                found.setdefault(each.base.layer, []).append(each)
        return found

    @property
    def fp8(self) -> bool:
        """Whether matrices are multiplied in FP8 (``emulate`` only rounds: it stores what bf16 does)."""
        return self.learner.precision.fp8 != "none" and not self.learner.precision.emulate

    @property
    def kernel(self) -> str:
        """The log-prob kernel: ``auto`` is part of the output projection."""
        return "fused" if self.learner.log_prob_kernel == "auto" else self.learner.log_prob_kernel

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.grid.tp

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.learner.context_parallel_size

    @property
    def tokens(self) -> float:
        """Of one micro-batch on one rank: its share of the rows under context parallelism."""
        return self.rows * self.length / self.cp

    @property
    def norm_tokens(self) -> float:
        """Of those, the ones whose norms and residuals this rank holds: sequence parallelism divides them over TP."""
        return self.tokens / (self.tp if self.learner.sequence_parallel else 1)

    @property
    def expected_length(self) -> float:
        """Tokens of a row that is neither short nor long."""
        return self.mean_length or self.length

    @property
    def expected_targets(self) -> float:
        """Response tokens of such a row."""
        return self.mean_targets or self.targets / self.rows

    @property
    def computed(self) -> tuple[float, float]:
        """Rows of a micro-batch and tokens of each, as expected: filled by tokens, or padded to the longest row."""
        if self.learner.max_tokens_per_micro_batch:
            return self.rows * self.length / self.expected_length, self.expected_length
        return self.rows, self.length


def expected_response(config: RunConfig) -> int:
    """Tokens of an average response where nobody states them: ``EXPECTED_SHARE`` of the longest."""
    return max(1, round(EXPECTED_SHARE * config.rollout.max_new_tokens))


def resamples(entropy: EntropyConfig) -> bool:
    """Whether a step draws auxiliary samples beside its own."""
    return entropy.controller != "none" and entropy.actuator == "resample"


def from_config(model: Architecture, config: RunConfig, mean_response: int = 0, imbalance: float = 1.0) -> Work:
    """The work of a run's step. ``mean_response``: expected response tokens; 0: all as long as they may be.

    Every auxiliary row is counted (the learner gets the correct ones). Raises ``ValueError`` that names what does not
    fit together.
    """
    learner, rollout, entropy = config.learner, config.rollout, config.entropy
    grid = grid_of(learner)
    model.check_layout(grid)
    step_rows = rollout.prompts_per_step * rollout.samples_per_prompt
    if resamples(entropy):
        prompts = entropy.auxiliary_prompts
        if entropy.pi.split_range:
            prompts = entropy.auxiliary_max_prompts or rollout.prompts_per_step
        step_rows += prompts * entropy.auxiliary_samples
    multiple = 2 * learner.context_parallel_size if learner.context_parallel_size > 1 else 1
    multiple *= grid.tp if learner.sequence_parallel else 1
    length = round_up(config.longest_row - 1, multiple)
    response = mean_response or rollout.max_new_tokens
    mean_length = min(length, rollout.max_prompt_tokens + response - 1)
    each, count, targets = _micro_batches(config, step_rows / learner.updates_per_step, length, mean_length)
    return Work(
        model=model,
        learner=learner,
        grid=grid,
        itemsize=ITEM_SIZES[config.model.dtype],
        rows=each,
        length=length,
        targets=targets,
        micro_batches=round_up(count, grid.pp) if grid.vpp > 1 else count,
        step_rows=step_rows,
        passes=_passes(config),
        reference=config.objective.kl_coef > 0 and not learner.lora.rank,  # without its adapters the model is one
        mean_length=mean_length,
        mean_targets=response,
        imbalance=imbalance if model.moe and grid.ep > 1 else 1.0,
        colocated=rollout.colocated,
    )


def _passes(config: RunConfig) -> int:
    """Forward passes over a step's rows beside training's; ``pipeline.step.prepare`` makes them.

    The teacher of ``rlrt`` is counted as if all rows had one.
    """
    objective, entropy, stale = config.objective, config.entropy, config.rollout.staleness > 0
    actuator = acting(entropy)
    ranked = actuator is not None and actuator.statistics
    statistics = ranked or bool(objective.token_shaping) or objective.loss in ("kl_cov", "htpo", "mcpo")
    told = stale and objective.old_log_probs == "engine"
    old = config.learner.updates_per_step > 1 and not statistics and not told
    return sum((objective.kl_coef > 0, old, statistics, "rlrt" in objective.token_shaping))


def _micro_batches(config: RunConfig, rows: float, length: int, mean_length: float) -> tuple[float, int, float]:
    """Rows of a micro-batch, micro-batches per optimizer step, and targets of a micro-batch.

    ``rows`` are those of the optimizer step.

    A micro-batch that is filled with tokens may hold hardly any prompt: all its tokens are counted as targets.
    """
    learner = config.learner
    per_rank = math.ceil(rows / learner.data_parallel_size)
    if learner.max_tokens_per_micro_batch:
        tokens = max(learner.max_tokens_per_micro_batch, length)
        return tokens / length, math.ceil(per_rank * mean_length / tokens), tokens
    count = math.ceil(per_rank / learner.micro_batch_size)
    each = math.ceil(per_rank / count)
    return each, count, each * config.rollout.max_new_tokens
