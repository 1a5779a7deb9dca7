"""Builds what one rank of a learner would hold, without its memory, its GPUs or the other ranks.

The modules, the gradient buffers and the optimizer are those of a run (``models``, ``optimizer``), on torch's ``meta``
device, in a process group of the full size whose other members do not exist (torch's own, made for its tests). The
layers are megatron-core's own: Transformer Engine's do not build without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ext import models, optimizer, topology
from pipeline.config.schema import LearnerConfig, PrecisionConfig
from pipeline.model.architecture import Architecture
from pipeline.model.built import Built
from pipeline.model.grid import Grid, Place, grid_of

META = torch.device("meta")


def build(model: Architecture, learner: LearnerConfig, dtype: str, rank: int) -> Built:
    """Rank ``rank`` of the learner, built and counted; ``dtype``: of the model, as in ``model.dtype``.

    FP8 is left out: megatron-core's own layers hold their weights as ``dtype`` does. Raises ``ValueError`` where the
    layout does not fit the model.
    """
    started = time.perf_counter()
    learner = replace(learner, transformer_impl="local", precision=PrecisionConfig())
    with _alone(grid_of(learner), rank) as placed:
        chunks = models.build_chunks(model, placed, dtype, learner)
        wrapped = optimizer.data_parallel(chunks, learner)
        adam = optimizer.build(wrapped, learner, dtype)
        return Built(
            rank=rank,
            place=_place(),
            shapes={name: tuple(p.shape) for gpt in chunks for name, p in models.global_parameters(gpt).items()},
            parameters=_parameter_bytes(chunks, wrapped),
            gradients=sum(_bytes(buffer.grad_data) for buffer in _buffers(wrapped)),
            optimizer=_optimizer_bytes(adam, dtype),
            seconds=time.perf_counter() - started,
        )


@contextmanager
def _alone(grid: Grid, rank: int) -> Iterator[topology.Topology]:
    """Within, this process is rank ``rank`` of ``grid``, and new tensors have shapes and no memory.

    Raises ``RuntimeError`` where this process is a rank of something already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process belongs to a process group already; rehearse in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=grid.world_size)
    try:
        with _on_meta(), META:
            yield topology.divide(grid, 0, META)
    finally:
        topology.shutdown()


@contextmanager
def _on_meta() -> Iterator[None]:
    """megatron-core names CUDA where it means the device of its parameters (see ``megatron_ext.cpu``).

    Within, that device is ``meta``: ``torch.cuda.current_device`` (core/distributed/param_and_grad_buffer.py,
    core/tensor_parallel/layers.py) and the names of tensor types (core/optimizer/{optimizer,distrib_optimizer}.py),
    0.16 to 0.19. It goes when megatron-core takes its device from the process group.
    """
    device, type_of = torch.cuda.current_device, torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        return answer.replace("torch.meta.", "torch.cuda.") if isinstance(answer, str) else answer

    torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
    torch.Tensor.type = named  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.cuda.current_device, torch.Tensor.type = device, type_of  # type: ignore[method-assign]


def _place() -> Place:
    """This rank's coordinates, as megatron-core's groups have them."""
    return Place(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        edp=parallel_state.get_expert_data_parallel_rank(),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _buffers(wrapped: Sequence[DistributedDataParallel]) -> list[Any]:
    return [buffer for part in wrapped for buffer in (*part.buffers, *part.expert_parallel_buffers)]


def _parameter_bytes(chunks: Sequence[GPTModel], wrapped: Sequence[DistributedDataParallel]) -> int:
    """Of the parameters, or of the buffers that hold them, and of the tensors that are not trained."""
    tensors = [tensor for gpt in chunks for tensor in models.global_parameters(gpt).values()]
    buffers = [buffer.param_data for buffer in _buffers(wrapped) if buffer.param_data is not None]
    outside = [tensor for tensor in tensors if not tensor.requires_grad] if buffers else tensors
    return sum(map(_bytes, (*buffers, *outside)))


def _optimizer_bytes(adam: MegatronOptimizer, dtype: str) -> int:
    """Of what the optimizer holds after an update by gradients without content."""
    total = 0
    for each in getattr(adam, "chained_optimizers", [adam]):
        parameters = [parameter for group in each.optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        each.optimizer.step()
        if dtype != "fp32":  # in float32 the model's own parameters are Adam's
            total += sum(map(_bytes, parameters))
        total += sum(_bytes(each.optimizer.state[p][name]) for p in parameters for name in ("exp_avg", "exp_avg_sq"))
    return total
