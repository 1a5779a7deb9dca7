"""Where an engine wants the tensors that an update brings, whoever holds them: a server's rank, a process or a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipeline.model.fp8 import CODES, quantise
from pipeline.model.fp8_layout import scale_name, scale_shape
from pipeline.reshard.execute import EngineShards
from pipeline.reshard.messages import DTYPES
from pipeline.reshard.plan import Plan

View = Callable[[str, Sequence[int], torch.dtype], torch.Tensor]  # name, shape and type of a rank's part -> its place


class Places:
    """What one engine rank receives, as the plan's tensors; what is quantised after it arrived waits beside its place.

    ``view`` says where each part belongs, also of codes and scales that come of such a tensor.
    """

    def __init__(self, view: View, device: torch.device | str = "cpu") -> None:
        self._view, self._device = view, device
        self._waiting: dict[str, torch.Tensor] = {}
        self._targets: dict[str, list[torch.Tensor]] = {}  # codes and scale of each that waits

    def shards(self, plan: Plan, process: int) -> EngineShards:
        """Where everything belongs that ``process`` needs; raises what ``view`` raises."""
        self._waiting, self._targets, found = {}, {}, {}
        for index, span in plan.needs(process).items():
            tensor = plan.tensors[index]
            name, kept = tensor.name, DTYPES[tensor.item_size]
            shape = tensor.part_shape(len(span))
            if tensor.quantise == "after":
                scales = scale_shape(tuple(shape))
                self._waiting[name] = torch.empty(shape, dtype=kept, device=self._device)
                self._targets[name] = [
                    self._view(name, shape, CODES),
                    self._view(scale_name(name), scales, torch.float32),
                ]
            view = self._waiting[name] if name in self._waiting else self._view(name, shape, kept)
            found[name] = span.start, view
        return EngineShards(found)

    def finish(self) -> None:
        """Quantise what had to arrive first. Raises ``ValueError`` on weights that are not finite."""
        for name, values in self._waiting.items():
            for target, result in zip(self._targets[name], quantise(values, name=name), strict=True):
                target.copy_(result)
        self._waiting, self._targets = {}, {}


class HostPlaces(Places):
    """Tensors of this process, by their names in the plan; new ones in every update."""

    def __init__(self) -> None:
        super().__init__(self._new)
        self.tensors: dict[str, torch.Tensor] = {}

    def _new(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.tensors[name] = torch.empty(list(shape), dtype=dtype)
        return self.tensors[name]
