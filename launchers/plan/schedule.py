"""Which micro-batches a pipeline stage has under way in megatron-core's 1F1B and interleaved schedules.

Source: megatron-core's ``pipeline_parallel/schedules.py``.

Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator


def under_way(stage: int, pp: int, vpp: int, micro_batches: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The state of ``stage`` at each of its backward passes.

    The model chunk that the pass runs, and how many forward passes of each chunk await theirs, its own included.

    ``micro_batches`` must be a multiple of ``pp`` where ``vpp`` > 1, as megatron-core asks.
    """
    total = micro_batches * vpp
    warmup = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    counts = [0] * vpp
    forward = 0
    for backward in range(total):
        while forward < min(total, warmup + backward + 1):
            counts[_chunk(forward, pp, vpp)] += 1
            forward += 1
        chunk = vpp - 1 - _chunk(backward, pp, vpp)
        yield chunk, tuple(counts)
        counts[chunk] -= 1


def bubble(pp: int, vpp: int, micro_batches: int) -> float:
    """Share of a stage's time that it waits: (pp - 1) / vpp micro-batches' worth beside ``micro_batches``."""
    idle = (pp - 1) / vpp
    return idle / (micro_batches + idle)


def _chunk(index: int, pp: int, vpp: int) -> int:
    """Model chunk of the ``index``-th forward pass: groups of ``pp`` micro-batches, chunk by chunk."""
    return index // pp % vpp
