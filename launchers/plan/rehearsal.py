"""Compares what a learner's ranks hold, as megatron-core built them, with what the plans say they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from launchers.plan.parameters import MAIN, held
from launchers.plan.work import Work, table
from pipeline.config.schema import RunConfig
from pipeline.model.built import Built
from pipeline.model.grid import Grid
from pipeline.model.layout import Row
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.plan import Plan, make_plan

_GPUS_PER_NODE = 8  # of which node a rank is decides what it sends, not what it holds


def kinds(grid: Grid) -> tuple[int, ...]:
    """A rank of each kind: the first and the last of every pipeline stage.

    The ranks of a stage hold equal parts of the same layers. The two are the first and the last of its tensor-, expert-
    and data-parallel groups.
    """
    each = grid.world_size // grid.pp
    return tuple(sorted({rank for stage in range(grid.pp) for rank in (stage * each, (stage + 1) * each - 1)}))


def sync_plan(work: Work, config: RunConfig) -> Plan:
    """The reshard plan from this learner to the run's engines, on GPUs of their own."""
    rollout, dtype = config.rollout, config.model.dtype
    engines = EngineGrid(rollout.tensor_parallel_size if rollout.engine == "sglang" else 1, count=rollout.engines)
    placement = Placement.consecutive(work.grid.world_size, engines.world_size, False, _GPUS_PER_NODE)
    return make_plan(work.model, work.grid, engines, placement, work.learner.bucket_bytes, dtype)


def differences(work: Work, plan: Plan, built: Built) -> list[dict[str, Any]]:
    """What a rank holds otherwise than planned: ``rank``, ``what``, ``planned`` and ``built``, first the places.

    ``work`` is that of ``launchers.plan.work.from_config``, without FP8 (see ``megatron_ext.rehearsal``).
    """
    found = [*_places(work.grid, built), *_shapes(work, built), *_bytes(work, built), *_sent(work, plan, built)]
    return [dict(zip(("rank", "what", "planned", "built"), (built.rank, *each), strict=True)) for each in found]


Difference = tuple[str, Any, Any]  # what, planned, built


def _places(grid: Grid, built: Built) -> Iterator[Difference]:
    planned = vars(grid.place(built.rank))
    for name, is_built in vars(built.place).items():
        if planned[name] != is_built:
            yield f"{name} rank", planned[name], is_built


def _shapes(work: Work, built: Built) -> Iterator[Difference]:
    """Names and shapes of the layout table against those of the modules; None: not there."""
    planned = {row.parameter: row.local_shape(parts) for row, parts, _ in _rows(work, built.rank)}
    for name in sorted({*planned, *built.shapes}):
        shapes = planned.get(name), built.shapes.get(name)
        if shapes[0] != shapes[1]:
            yield name, *shapes


def _bytes(work: Work, built: Built) -> Iterator[Difference]:
    planned = held(work, work.grid.place(built.rank).pp)
    for name, width in (("parameters", work.itemsize), ("gradients", MAIN)):
        least, found = getattr(planned, name), getattr(built, name)
        if not least <= found <= least + planned.bucket_ends * width:
            yield f"bytes of {name}", least, found
    if abs(built.optimizer - planned.optimizer) > planned.unsure:
        yield "bytes of optimizer", planned.optimizer, built.optimizer


def _sent(work: Work, plan: Plan, built: Built) -> Iterator[Difference]:
    """Pieces of Hugging Face tensors that a weight sync takes from this rank, and which of its parameters lack."""
    holds: dict[str, list[range]] = {}
    for row, parts, part in _rows(work, built.rank):
        shape = built.shapes.get(row.parameter, (0,) * len(row.sources[0].shape))
        for cut in row.slices(parts, part):
            if cut.start + cut.length <= shape[row.dim]:
                span = range(cut.source_start, cut.source_start + cut.length)
                holds.setdefault(row.sources[cut.source].name, []).append(span)
    tasks = plan.tasks(built.rank)
    mine = tasks.source == built.rank
    for index, start, length in np.stack([tasks.tensor, tasks.start, tasks.length])[:, mine].T.tolist():
        name = plan.tensors[index].name
        if not _covered(range(start, start + length), holds.get(name, [])):
            yield (
                f"what a weight sync sends of {name}",
                [start, start + length],
                [[span.start, span.stop] for span in holds.get(name, [])],
            )


def _covered(piece: range, spans: Sequence[range]) -> bool:
    at = piece.start
    for span in sorted(spans, key=lambda span: span.start):
        at = max(at, span.stop) if span.start <= at else at
    return at >= piece.stop


def _rows(work: Work, rank: int) -> Iterator[tuple[Row, int, int]]:
    """Every row of which ``rank`` holds something, how many parts it has and which is the rank's."""
    adapted = (row for each in work.adapters.values() for row in (each.a, each.b))
    for row in (*table(work.model, work.grid)[work.grid.place(rank).pp], *adapted):
        if (part := row.part(work.grid, rank)) is not None:
            yield row, *part
