"""What runs inside every rank of an SGLang server when weights come: takes its slices into the rank's own parameters.

``--custom-weight-loader`` names :func:`receive`, and SGLang calls it for ``/update_weights_from_tensor`` with this
``load_format`` (``sglang/srt/model_executor/model_runner_components/weight_updater.py``). The request's one tensor
tells the rank what to do; the weights come from the learner's ranks. An exception here would end the server, so what
goes wrong is reported in a file, which the engine reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from pipeline.model.fp8 import quantise
from pipeline.model.fp8_layout import scale_name
from pipeline.reshard.engine_parameters import Target, targets
from pipeline.reshard.execute import DTYPES, EngineShards
from pipeline.reshard.order import Order, Report
from pipeline.reshard.participant import Participant
from pipeline.reshard.plan import Plan

LOADER = f"{__name__}.receive"
CONTROL = "isentrope"  # the name of the request's one tensor

_PARTICIPANT = Participant()  # of this rank


@dataclass(frozen=True)
class Control:
    """What one rank is told."""

    order: Order
    process: int  # of the plan
    report: str  # the file to write

    def to_tensor(self) -> torch.Tensor:
        """As SGLang carries it."""
        return torch.frombuffer(bytearray(msgspec.json.encode(self)), dtype=torch.uint8)


def receive(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Take part in one update; never raises. The report is written whole or not at all."""
    text = bytes(dict(named_tensors)[CONTROL].cpu().numpy())
    control = msgspec.json.decode(text, type=Control)
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    place = _Parameters(parameters)
    device = next(iter(parameters.values())).device
    report = _PARTICIPANT.receive(control.order, control.process, place.shards, device)
    if not report.error:
        report = place.finish(report)
    path = Path(control.report)
    path.with_suffix(".partial").write_bytes(msgspec.json.encode(report))
    os.replace(path.with_suffix(".partial"), path)


def read_report(path: Path) -> Report:
    """What the rank wrote. Raises ``OSError`` when it wrote nothing."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


class _Parameters:
    """The rank's parameters as the plan's tensors; what comes before it is quantised lies beside them until then."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self._places: Mapping[str, Target] = {}
        self._waiting: dict[str, torch.Tensor] = {}  # tensors that are quantised after they arrived

    def shards(self, plan: Plan, process: int) -> EngineShards:
        """Where everything belongs that ``process`` needs. Raises ``ValueError`` where the server has no such place."""
        self._places, self._waiting = targets(plan, process), {}
        found = {}
        for index, span in plan.needs(process).items():
            tensor = plan.tensors[index]
            shape = [len(span) if dim == tensor.dim else size for dim, size in enumerate(tensor.shape)]
            if tensor.quantise == "after":
                example = next(iter(self._parameters.values()))
                view = example.new_empty(shape, dtype=DTYPES[tensor.item_size])
                self._waiting[tensor.name] = view
            else:
                view = self._view(tensor.name, shape)
            found[tensor.name] = span.start, view
        return EngineShards(found)

    def finish(self, report: Report) -> Report:
        """Quantise what had to arrive first."""
        try:
            for name, values in self._waiting.items():
                for part, result in zip((name, scale_name(name)), quantise(values, name=name), strict=True):
                    self._view(part, list(result.shape)).copy_(result)
        except (ValueError, RuntimeError) as error:
            return replace(report, error=str(error))
        self._waiting = {}
        return report

    def _view(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        place = self._places[name]
        if place.parameter not in self._parameters:
            raise ValueError(f"{name}: the server has no parameter {place.parameter!r}")
        parameter = self._parameters[place.parameter][place.index]
        dim, start, length = place.dim, place.start, shape[place.dim]
        if place.half is not None:
            parameter, start = parameter.chunk(2, dim)[place.half], 0
        room = parameter.shape[dim]
        if start + length > room or (*parameter.shape[:dim], length, *parameter.shape[dim + 1 :]) != tuple(shape):
            raise ValueError(
                f"{name}: {list(shape)} from {start} on does not fit into the server's {place.parameter!r}, "
                f"{list(parameter.shape)}"
            )
        if place.half is not None:
            # On a CPU SGLang pads the feed-forward to 32 entries a rank and divides that; the plan divides evenly, and
            # what is left of each rank's part must add nothing.
            parameter.narrow(dim, length, room - length).zero_()
        return parameter.narrow(dim, start, length)
