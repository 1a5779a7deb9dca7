"""What one learner rank holds, as megatron-core built it: the facts that a plan's figures are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.model.grid import Place


@dataclass(frozen=True)
class Built:
    """One rank's modules, gradient buffers and optimizer, counted. Sizes are bytes."""

    rank: int
    place: Place  # by megatron-core's own parallel groups
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter, by the layout's names (``pipeline.model.layout``)
    parameters: int  # with the padding of buffers that the distributed optimizer divides
    gradients: int
    optimizer: int  # Adam's two moments and, beside parameters of another type, float32 main parameters
    seconds: float  # that building took
