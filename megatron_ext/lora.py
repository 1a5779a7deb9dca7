"""Low-rank adapters beside megatron-core's parallel linear layers, and the weights they are merged into.

A linear layer's output gets ``scale * B (A x)`` added (LoRA, arXiv 2106.09685). Under tensor parallelism the ranks
exchange the small ``A x``. Beside a column-parallel layer ``A`` is whole and ``B`` divided; beside a row-parallel one
``A`` is divided and ``B`` whole; beside a layer that every rank has (latent attention's down-projections) both are
whole. What is whole sees a rank's own tokens alone under sequence parallelism; megatron-core then adds its gradient up
over the ranks.

Beside a routed expert nothing is exchanged: the dispatcher has brought all tokens to each of the expert's ranks, and
adds up what those make of them. There the gradient of what is whole is added up as it is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ext.topology import Topology
from megatron_ext.weights.merge import merge
from pipeline import seeds
from pipeline.model import lora
from pipeline.model.layout import Row

_NAME = ".lora."  # of adapters among a model's parameters


class Adapter(torch.nn.Module):
    """The adapter of one linear layer, on one rank. ``enabled`` is False while the model computes without adapters."""

    _owners: torch.Tensor

    def __init__(self, spec: lora.Adapter, linear: Any, scale: float, topology: Topology) -> None:
        super().__init__()
        self.spec, self.scale, self.enabled = spec, scale, True
        grid, place, self._split = topology.grid, topology.place, spec.base.split
        self._expert = spec.base.expert is not None
        self._part = (grid.expert_tp, place.etp) if self._expert else (grid.tp, place.tp)
        self._group = topology.expert_tp_group if self._expert else topology.tp_group
        self._sequence_parallel = bool(linear.config.sequence_parallel) and not self._expert
        self.A, self.B = (
            torch.nn.Parameter(linear.weight.new_empty(row.local_shape(self._part[0]))) for row in (spec.a, spec.b)
        )
        for parameter, row in ((self.A, spec.a), (self.B, spec.b)):
            self._mark(parameter, row, linear.weight)
        # Which source's A each row of B is multiplied with, [out, sources].
        owners = linear.weight.new_zeros(len(self.B), len(spec.sources))
        for source, start, length in spec.outputs(*self._part):
            owners[start : start + length, source] = 1
        self.register_buffer("_owners", owners, persistent=False)

    def _mark(self, parameter: torch.nn.Parameter, row: Row, weight: torch.Tensor) -> None:
        """Tell megatron-core over which ranks a gradient is added up, and which ranks' count in the gradient's norm."""
        given: Any = parameter
        given.allreduce = getattr(weight, "allreduce", True)
        given.sequence_parallel = self._sequence_parallel and row.split is None
        if row.split is not None or self._expert:  # experts of other ranks are others
            set_tensor_model_parallel_attributes(parameter, True, row.dim, 1)
            given.shared = row.split is None and self._part[1] > 0  # counted once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the linear layer's output, of its input."""
        a, b = self.A, self.blocks()
        if self._expert and self._split == 0:
            a = copy_to_tensor_model_parallel_region(a, group=self._group)
        elif self._expert:
            b = copy_to_tensor_model_parallel_region(b, group=self._group)
        inner = torch.nn.functional.linear(x, a)
        if self._split is not None and not self._expert:
            inner = self._exchanged(inner)
        return torch.nn.functional.linear(inner, b) * self.scale

    def _exchanged(self, inner: torch.Tensor) -> torch.Tensor:
        """``A x`` as ``B`` takes it, under tensor parallelism."""
        if self._split == 0 and self._sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self._group)
        if self._split == 0:
            return copy_to_tensor_model_parallel_region(inner, group=self._group)
        if self._sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self._group)
        return reduce_from_tensor_model_parallel_region(inner, group=self._group)

    def blocks(self) -> torch.Tensor:
        """``B`` with the rows of each source in columns of its own, ``[out, sources * rank]``."""
        if len(self.spec.base.sources) == 1:
            return self.B
        return (self.B[:, None] * self._owners[:, :, None]).flatten(1)

    def reset(self, seed: int) -> None:
        """``A`` as PEFT draws it (uniform, up to 1 / sqrt(in)), the same in every layout; ``B`` zero."""
        self.B.data.zero_()
        whole = [_drawn(source.shape, seed, source.name) for source in self.spec.a.sources]
        for cut in self.spec.a.slices(*self._part):
            dim = self.spec.a.dim
            values = whole[cut.source].narrow(dim, cut.source_start, cut.length)
            self.A.data.narrow(dim, cut.start, cut.length).copy_(values)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron-core's linear layers describe their own parameters."""
        divided = {"A": self.spec.a.split, "B": self.spec.b.split}
        axes = {name: dim for name, dim in divided.items() if dim is not None}
        groups = {"tp_group": self._group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        tensors = self.state_dict(keep_vars=True)
        state = make_sharded_tensors_for_checkpoint(tensors, prefix, axes, sharded_offsets, **groups)
        if len(self.spec.b.sources) > 1 and not self.spec.b.groups:  # gate and up, one below the other on every rank
            state[prefix + "B"] = apply_swiglu_sharded_factory(state[prefix + "B"], sharded_offsets)
        return state


def _drawn(shape: Sequence[int], seed: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seeds.stream_seed(seed, f"lora/{name}"))
    bound = shape[1] ** -0.5
    return torch.empty(*shape, device="cpu").uniform_(-bound, bound, generator=generator)


def attach(
    gpt: GPTModel, names: Mapping[str, str], specs: Iterable[lora.Adapter], scale: float, topology: Topology
) -> None:
    """Freeze ``gpt``, and give an adapter to each of its linear layers that ``specs`` names.

    ``names``: of its parameters, by the layout's names. The layers' own norms must not be fused into them.
    """
    gpt.requires_grad_(False)
    for spec in specs:
        if spec.base.parameter in names:
            linear: Any = gpt.get_submodule(names[spec.base.parameter].removesuffix(".weight"))
            linear.lora = Adapter(spec, linear, scale, topology)
            linear.register_forward_hook(_add)
            linear.sharded_state_dict = _described(linear)
    if gpt.pre_process:  # recomputed layers have gradients only where their input has
        gpt.embedding.register_forward_hook(_differentiable)


def _add(linear: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    return (output[0] + linear.lora(inputs[0]), output[1]) if linear.lora.enabled else output


def _differentiable(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _described(linear: Any) -> Any:
    """``linear.sharded_state_dict`` that describes the adapter by itself: the layer takes it for its own and whole."""
    own = linear.sharded_state_dict

    def described(prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        state = own(prefix, sharded_offsets, metadata)
        state = {name: part for name, part in state.items() if not name.startswith(f"{prefix}lora.")}
        return state | linear.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)

    return described


def find(chunks: Sequence[GPTModel]) -> dict[str, Adapter]:
    """Adapters by the layout's name of the parameter they are of."""
    modules = (module for gpt in chunks for module in gpt.modules())
    return {module.spec.base.parameter: module for module in modules if isinstance(module, Adapter)}


def base(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that are no adapter's."""
    return {name: tensor for name, tensor in parameters.items() if _NAME not in name}


@contextmanager
def without(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Within, the model computes without its adapters."""
    found = list(adapters)
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True


class Merged(Mapping[str, torch.Tensor]):
    """Parameters by the layout's names, adapters added to those that have one, when they are asked for.

    The sum is made in float32 and rounded once, to the parameter's type. The ``keep`` asked for last are kept, as a
    bucket of a weight update sends a parameter piece by piece.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], adapters: Mapping[str, Adapter], keep: int = 2) -> None:
        self._parameters, self._adapters, self._keep = parameters, adapters, keep
        self._made: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._adapters:
            return self._parameters[name]
        if name not in self._made:
            adapter = self._adapters[name]
            self._made[name] = merge(self._parameters[name], adapter.blocks(), adapter.A, adapter.scale)
        self._made.move_to_end(name)
        while len(self._made) > self._keep:
            self._made.popitem(last=False)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
