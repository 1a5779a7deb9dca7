"""What runs inside every rank of an SGLang server when weights come: takes its slices into the rank's own parameters.

``--custom-weight-loader`` names ``receive``, and SGLang calls it for ``/update_weights_from_tensor`` with this
``load_format`` (``sglang/srt/model_executor/model_runner_components/weight_updater.py``). The request's one tensor
tells the rank what to do; the weights come from the learner's ranks. An exception here would end the server, so what
goes wrong is reported in a file, which the engine reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from pipeline.disk import replacing
from pipeline.model.fp8 import CODES
from pipeline.reshard.engine_parameters import Target, targets
from pipeline.reshard.execute import EngineShards
from pipeline.reshard.order import Order, Report
from pipeline.reshard.participant import Participant
from pipeline.reshard.places import Places
from pipeline.reshard.plan import Plan

LOADER = f"{__name__}.receive"
CONTROL = "isentrope"  # the name of the request's one tensor

_PARTICIPANT = Participant()  # of this rank
log = logging.getLogger(__name__)
_REMEDY = "the server was started with a layout that the plan does not know: set rollout.weight_transport=disk"


@dataclass(frozen=True)
class Control:
    """What one rank is told."""

    order: Order
    rank: int  # of the engines', numbered over all of them
    report: str  # the file to write

    def to_tensor(self) -> torch.Tensor:
        """As SGLang carries it."""
        return torch.frombuffer(bytearray(msgspec.json.encode(self)), dtype=torch.uint8)


def receive(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Take part in one update; never raises. The report is written whole or, on a full disk, not at all."""
    text = bytes(dict(named_tensors)[CONTROL].cpu().numpy())
    control = msgspec.json.decode(text, type=Control)
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    device = next(iter(parameters.values())).device
    report = _PARTICIPANT.receive(control.order, control.rank, _Parameters(parameters, device), device)
    path = Path(control.report)
    try:
        with replacing(path) as partial:
            partial.write_bytes(msgspec.json.encode(report))
    except OSError:
        log.exception("no report of weight version %d", control.order.version)


def read_report(path: Path) -> Report:
    """What the rank wrote. Raises ``OSError`` when it wrote nothing."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


class _Parameters(Places):
    """The parameters of the rank as the plan's tensors."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], device: torch.device) -> None:
        super().__init__(self._place, device)
        self._parameters = parameters
        self._planned: Mapping[str, Target] = {}
        self._filled: dict[str, tuple[int, int]] = {}  # of what must not be padded: the dimension, and how far it goes

    def shards(self, plan: Plan, process: int) -> EngineShards:
        """See ``Places``. Raises ``ValueError`` where the server has no such place, or a larger one."""
        self._planned, self._filled = targets(plan, process), {}
        found = super().shards(plan, process)
        for name, (dim, filled) in self._filled.items():
            shape = list(self._parameters[name].shape)
            if shape[dim] > filled:
                raise ValueError(
                    f"the server's {name!r} is {shape}, the plan brings {filled} of the {shape[dim]} entries along "
                    f"dimension {dim}: on a CPU, SGLang pads the heads where rollout.tensor_parallel_size does not "
                    "divide the model's num_key_value_heads; set it to a divisor, or set rollout.weight_transport=disk"
                )
        return found

    def _place(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        place = self._planned[name]
        if place.parameter not in self._parameters:
            raise ValueError(f"{name}: the server has no parameter {place.parameter!r}; {_REMEDY}")
        parameter = self._parameters[place.parameter][place.index]
        dim, start, length = place.dim, place.start, shape[place.dim]
        if place.half is not None:
            parameter, start = parameter.chunk(2, dim)[place.half], 0
        room = parameter.shape[dim]
        if start + length > room or (*parameter.shape[:dim], length, *parameter.shape[dim + 1 :]) != tuple(shape):
            raise ValueError(
                f"{name}: {list(shape)} from {start} on does not fit into the server's {place.parameter!r}, "
                f"{list(parameter.shape)}; {_REMEDY}"
            )
        if CODES in (dtype, parameter.dtype) and dtype != parameter.dtype:
            raise ValueError(
                f"{name} comes as {dtype}, the server has {parameter.dtype}: start it as rollout.weight_dtype says"
            )
        if place.half is not None:
            # On a CPU SGLang pads the feed-forward to 32 entries a rank and divides that; the plan divides evenly, and
            # what is left of each rank's part must add nothing.
            parameter.narrow(dim, length, room - length).zero_()
        if not place.padded:
            self._filled[place.parameter] = dim, max(start + length, self._filled.get(place.parameter, (dim, 0))[1])
        return parameter.narrow(dim, start, length)
