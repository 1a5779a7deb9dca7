"""Predicts the bytes that stay from step to step: parameters, main gradients, optimizer state, FP8 copies.

From the layout table alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launchers.plan.work import Work, table
from pipeline.model.fp8_layout import quantised
from pipeline.model.layout import Row
from pipeline.units import FP8_BLOCK, round_up

MAIN = 4  # bytes of float32: main gradients, main parameters, each of Adam's two moments
# entries to which the distributed optimizer's buffer aligns every parameter (megatron-core, param_and_grad_buffer.py)
_START = 64
_END = 128  # and, with the number of ranks, every bucket's end
_BUCKET = 40_000_000  # entries at which ``overlap_grad_reduce`` begins the next (distributed_data_parallel.py)
# Bytes of scales per FP8 byte: one float32 for 128 x 128 weights, one byte for 32 (docs of Transformer Engine's
# recipes).
_SCALES = {"blockwise": 4 / FP8_BLOCK**2, "mxfp8": 1 / 32}


@dataclass(frozen=True)
class Held:
    """Bytes of one rank of a stage."""

    parameters: float
    gradients: float
    optimizer: float
    fp8: float  # copies of weights in FP8, by rows and by columns; with fp8_param only those by columns
    reference: float
    largest: int  # entries of the largest parameter that is trained
    bucket_ends: int  # entries of padding, at most, that are not counted: at the ends of buckets within a buffer
    unsure: float  # bytes by which a rank's optimizer may differ: the padding in its share, which has no state


def held(work: Work, stage: int) -> Held:
    """What the ranks of a pipeline stage hold (all of them alike)."""
    chunks: dict[int, list[Row]] = {}
    chunk_of = {layer: c for s in work.grid.chunks(work.model.layers) for c, span in enumerate(s) for layer in span}
    for row in table(work.model, work.grid)[stage]:
        if not row.ep:  # None, or the first of the expert-parallel ranks
            ends = 0 if stage == 0 and row.parameter.startswith("embedding") else work.grid.vpp - 1
            chunks.setdefault(ends if row.layer is None else chunk_of[row.layer], []).append(row)
    everything = [row for part in chunks.values() for row in part]
    trained = [[row for row in part if not _is_buffer(row)] for part in chunks.values()]
    if work.adapters:  # the model's own weights have neither gradients nor optimizer state
        trained = [[own for row in part for own in _adapter(work, row)] for part in trained]
        everything += [row for part in trained for row in part]
    divided = [
        [row for row in part if _buffer(work, row) == which] for part in trained for which in ("all", "tied", "experts")
    ]
    exact = sum(entries(work, row) for part in divided for row in part)
    padded = sum(_buffer_entries(work, part) for part in divided)
    ends = sum(_bucket_ends(work, part) for part in divided)
    fp8 = sum(entries(work, row) for row in everything if stored_in_fp8(work, row))
    copies = (1 if work.learner.precision.fp8_param else 2) * (1 + _scales(work))
    return Held(
        parameters=sum(_parameter_bytes(work, row) for row in everything) + (padded - exact) * work.itemsize,
        gradients=MAIN * padded,
        optimizer=sum(_optimizer_bytes(work, part) for part in divided),
        fp8=copies * fp8,
        reference=work.itemsize * exact if work.reference else 0.0,
        largest=max((entries(work, row) for part in trained for row in part), default=0),
        bucket_ends=ends,
        unsure=_optimizer_copies(work) * MAIN * (padded - exact + ends),
    )


def _adapter(work: Work, row: Row) -> tuple[Row, ...]:
    adapter = work.adapters.get(row.parameter)
    return (adapter.a, adapter.b) if adapter else ()


def entries(work: Work, row: Row) -> int:
    """Entries of a parameter on one rank that holds it, padding included."""
    return math.prod(row.local_shape(work.tp if row.expert is None else work.grid.expert_tp))


def stored_in_fp8(work: Work, row: Row) -> bool:
    """Whether a parameter takes part in FP8 products."""
    if not work.fp8 or row.layer is None or not quantised(row):
        return False
    return not work.learner.precision.in_bf16(row.layer, work.model.layers)


def _parameter_bytes(work: Work, row: Row) -> float:
    if work.learner.precision.fp8_param and stored_in_fp8(work, row):
        return entries(work, row) * (1 + _scales(work))
    return entries(work, row) * (MAIN if row.float32 else work.itemsize)


def _scales(work: Work) -> float:
    return _SCALES.get(work.learner.precision.fp8_recipe, 0.0)


def _is_buffer(row: Row) -> bool:
    """Megatron keeps the router's correction bias as a buffer: no gradient, no optimizer state."""
    return row.parameter.endswith(".expert_bias")


def _buffer(work: Work, row: Row) -> str:
    """Parameters that megatron-core reduces together: over ``all`` data-parallel ranks, or over an expert's replicas.

    A ``tied`` matrix that two stages hold has a bucket of its own there.
    """
    if row.expert is not None and (work.grid.ep > 1 or work.grid.expert_tp != work.grid.tp):
        return "experts"
    ends = row.parameter.startswith(("embedding.", "output_layer."))
    return "tied" if work.model.tied and work.grid.pp > 1 and ends else "all"


def _buffer_entries(work: Work, part: Sequence[Row]) -> int:
    """Of the gradient buffer of these parameters, padded where the distributed optimizer divides it."""
    sizes = [entries(work, row) for row in part]
    if not sizes or not work.learner.optimizer.distributed:
        return sum(sizes)
    return round_up(sum(round_up(size, _START) for size in sizes), math.lcm(_replicas(work, part), _END))


def _bucket_ends(work: Work, part: Sequence[Row]) -> int:
    config = work.learner.optimizer
    if not (part and config.distributed and config.overlap_grad_reduce):
        return 0
    within = _buffer_entries(work, part) // _BUCKET
    return within * (math.lcm(_replicas(work, part), _END) - 1)


def _optimizer_bytes(work: Work, part: Sequence[Row]) -> float:
    """Bytes of Adam's moments and, beside parameters of another type, of float32 main parameters.

    Of the rank with the largest share.
    """
    shared = _replicas(work, part) if work.learner.optimizer.distributed else 1
    return _optimizer_copies(work) * MAIN * _buffer_entries(work, part) / shared


def _optimizer_copies(work: Work) -> int:
    """Float32 numbers that the optimizer keeps of a parameter."""
    return 2 if work.itemsize == MAIN else 3


def _replicas(work: Work, part: Sequence[Row]) -> int:
    """Ranks that hold these parameters alike."""
    return work.grid.expert_dp if part and _buffer(work, part[0]) == "experts" else work.grid.dp
