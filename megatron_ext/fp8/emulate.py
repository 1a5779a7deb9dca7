"""A model's linear layers computed as the chosen FP8 recipe would, in torch on any device: to measure FP8's effect.

The three products of a linear layer take their operands through ``quantise``, as Transformer Engine's ``Linear`` does;
sums are float32, the result is of the input's type:

- forward ``y = x w'``: ``x`` and ``w`` rounded along the input features;
- ``dx = g w``: ``g`` and ``w`` rounded along the output features;
- ``dw = g' x``: ``g`` and ``x`` rounded along the tokens.

Where blocks are one-dimensional (blockwise x and g, all of mxfp8) the two roundings of a tensor differ, each made of
the original. Under TP each rank rounds its own shard, so a tensorwise scale of a weight, of a row-parallel input or of
a column-parallel gradient is of the shard; what sequence parallelism divides is rounded as one whole. ``delayed``
reduces its largest magnitudes over TP x CP x DP. All of that is as Transformer Engine does it. Not emulated: the tensor
cores' shorter accumulators, and FP8 in attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_ext.fp8 import quantise
from megatron_ext.fp8.quantise import E4M3, E5M2, MX_SIDE, SIDE, Delayed, Quantised
from pipeline.config.schema import PrecisionConfig


class Quantiser(Protocol):
    """Rounds one operand of a linear layer."""

    def __call__(self, x: torch.Tensor, *, training: bool) -> tuple[Quantised, Quantised]:
        """``x`` ``[rows, columns]`` rounded along its rows (last dimension) and along its columns (first dimension).

        With ``training=False`` there will be no backward pass: the second may be the first.
        """
        ...


@dataclass(frozen=True)
class Operands:
    """The quantisers of one linear layer: of its input, its weight and its output's gradient."""

    x: Quantiser
    w: Quantiser
    g: Quantiser


def install(gpt: GPTModel, precision: PrecisionConfig) -> None:
    """Let the linear layers of ``gpt``'s transformer layers (attention, feed-forward, experts) compute in FP8.

    Embedding, output layer, router and norms stay as they are, and with ``first_last_layers_bf16`` so do those layers.
    To be called once, on a model of megatron-core's own linear layers. ``delayed`` adds its state to them as buffers,
    which checkpoints hold.
    """
    for layer in gpt.decoder.layers:
        if not precision.in_bf16(layer.layer_number - 1, gpt.config.num_layers):
            for module in layer.modules():
                if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    convert(module, precision)


def convert(module: ColumnParallelLinear | RowParallelLinear, precision: PrecisionConfig) -> None:
    """Let one linear layer compute in FP8."""
    module._forward_impl = _forward(operands(precision, module))


def operands(precision: PrecisionConfig, module: torch.nn.Module) -> Operands:
    """Quantisers of ``precision``'s recipe for one linear layer, which gets the buffers that ``delayed`` needs."""
    forward, backward = E4M3, E5M2 if precision.fp8 == "hybrid" else E4M3
    if precision.fp8_recipe == "delayed":
        names = (("input", forward), ("weight", forward), ("grad", backward))
        return Operands(*(_delayed(precision, module, name, dtype) for name, dtype in names))
    if precision.fp8_recipe == "tensorwise":
        return Operands(_tensorwise(forward), _tensorwise(forward), _tensorwise(backward))
    if precision.fp8_recipe == "blockwise":
        return Operands(
            _lines(quantise.blockwise, forward, SIDE), _squares(forward), _lines(quantise.blockwise, backward, SIDE)
        )
    rounded = (_lines(quantise.mxfp8, dtype, MX_SIDE) for dtype in (forward, forward, backward))
    return Operands(*rounded)


def _tensorwise(dtype: torch.dtype) -> Quantiser:
    def quantiser(x: torch.Tensor, *, training: bool) -> tuple[Quantised, Quantised]:
        rounded = quantise.tensorwise(x, dtype)
        return rounded, rounded

    return quantiser


def _squares(dtype: torch.dtype) -> Quantiser:
    def quantiser(x: torch.Tensor, *, training: bool) -> tuple[Quantised, Quantised]:
        rounded = quantise.blockwise(x, dtype, (SIDE, SIDE))
        return rounded, rounded

    return quantiser


def _lines(rule: Callable[..., Quantised], dtype: torch.dtype, side: int) -> Quantiser:
    def quantiser(x: torch.Tensor, *, training: bool) -> tuple[Quantised, Quantised]:
        rows = rule(x, dtype, (1, side))
        return rows, rule(x, dtype, (side, 1)) if training else rows

    return quantiser


def _delayed(precision: PrecisionConfig, module: torch.nn.Module, name: str, dtype: torch.dtype) -> Quantiser:
    device = next(module.parameters()).device
    module.register_buffer(f"fp8_{name}_history", torch.zeros(precision.fp8_amax_history_len, device=device))
    module.register_buffer(f"fp8_{name}_scale", torch.ones((), device=device))

    def quantiser(x: torch.Tensor, *, training: bool) -> tuple[Quantised, Quantised]:
        state = Delayed(  # the buffers as they are now: loading a checkpoint may put others in their place
            getattr(module, f"fp8_{name}_history"),
            getattr(module, f"fp8_{name}_scale"),
            dtype,
            margin=precision.fp8_margin,
            algorithm=precision.fp8_amax_compute_algo,
        )
        rounded = state.quantise(x)
        if training:
            _reduce(state.history[:1])
            state.update()
        return rounded, rounded

    return quantiser


def _reduce(amax: torch.Tensor) -> None:
    """Largest of ``amax`` over the ranks that hold the same stage: megatron-core's amax reduction group."""
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)


def _forward(quantisers: Operands) -> Callable[..., torch.Tensor]:
    """What takes the place of megatron-core's ``linear_with_grad_accumulation_and_async_allreduce``."""

    def forward(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,  # of fusions and deferral, which are off
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = linear(input, weight, quantisers)
        return output if bias is None else output + bias

    return forward


def linear(x: torch.Tensor, weight: torch.Tensor, quantisers: Operands) -> torch.Tensor:
    """``x`` ``[..., in]`` times the transpose of ``weight`` ``[out, in]``, all three products of it rounded as the
    module says.
    """
    return _Linear.apply(x, weight, quantisers, torch.is_grad_enabled())


class _Linear(torch.autograd.Function):
    """``x w'`` and its gradients; codes and scales are kept for the backward pass, a byte an entry."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, quantisers: Operands, training: bool) -> torch.Tensor:
        x_rows, x_columns = quantisers.x(x.reshape(-1, x.shape[-1]), training=training)
        w_rows, w_columns = quantisers.w(weight, training=training)
        ctx.save_for_backward(x_columns.codes, x_columns.scale_inv, w_columns.codes, w_columns.scale_inv)
        ctx.blocks, ctx.quantiser = (x_columns.block, w_columns.block), quantisers.g
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        y = x_rows.dequantise() @ w_rows.dequantise().T
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        x, w = Quantised(x_codes, x_scale, ctx.blocks[0]), Quantised(w_codes, w_scale, ctx.blocks[1])
        g_rows, g_columns = ctx.quantiser(grad.reshape(-1, grad.shape[-1]), training=True)
        dx = g_rows.dequantise() @ w.dequantise()
        dw = g_columns.dequantise().T @ x.dequantise()
        return dx.to(ctx.dtypes[0]).view(ctx.shape), dw.to(ctx.dtypes[1]), None, None
