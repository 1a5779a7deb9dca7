"""Learner state in megatron's distributed checkpoint format (``torch_dist``), written by the process that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.topology import Topology
from megatron_ext.weights import unpickle

# The distributed optimizer's state, gathered over DP: the one format that megatron can load at another layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class _SaveInProcess(torch_dist.TorchDistSaveShardedStrategy):
    """megatron's ``torch_dist`` writer without its helper processes.

    The upstream writer starts a spawned manager and forks one process per file even for a synchronous save, which hangs
    in scripts without a main guard and is unsafe inside Ray actors. Same files, read by the upstream loader (0.16 to
    0.19).
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        tensors, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        try:
            dcp.save(
                torch_dist.mcore_to_pyt_state_dict(tensors, False),
                storage_writer=dcp.FileSystemWriter(checkpoint_dir),
                planner=torch_dist.MCoreSavePlanner(flatten_state_dict=False),
            )
        except CheckpointException as error:  # a BaseException, which nobody expects
            said = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise RuntimeError(f"{checkpoint_dir} could not be written: {said}") from error


def save(
    directory: Path,
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    reference: Sequence[dict[str, torch.Tensor]],
    topology: Topology,
) -> None:
    """Write parameters, optimizer, schedule, RNG states and the reference policy, if any. A collective of all ranks.

    ``chunks`` are this rank's model chunks, ``reference`` as many dictionaries of parameters, or none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = _state(chunks, optimizer, reference, topology, loading=False)
    force_all_tensors_to_non_fp8(state)  # loading does the same; the optimizer holds what FP8 rounded away
    state["layout"] = _layout(topology)
    state["scheduler"] = scheduler.state_dict()
    dist_checkpointing.save(state, str(directory), _SaveInProcess("torch_dist", 1))


def restore(
    directory: Path,
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    reference: Sequence[dict[str, torch.Tensor]],
    topology: Topology,
) -> None:
    """Load what :func:`save` wrote, in place, but for hyper-parameters: those stay as ``optimizer`` was configured.

    Raises ``ValueError`` where the checkpoint has another layout, or would execute code.
    """
    unpickle.check(directory)
    saved = dist_checkpointing.load_common_state_dict(str(directory)).get("layout")
    if saved != _layout(topology):
        raise ValueError(
            f"{directory} was saved by a learner of layout {saved}, this one is {_layout(topology)}: use the same"
        )
    state = dist_checkpointing.load(_state(chunks, optimizer, reference, topology, loading=True), str(directory))
    for index, gpt in enumerate(chunks):
        gpt.load_state_dict(state["model"][f"model{index}"])
    configured = [dict(group) for group in optimizer.param_groups]
    _lend(optimizer, state["optimizer"])
    optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(optimizer.param_groups, configured, strict=True):
        # All but what training changes; the scheduler's own state then sets lr and weight_decay.
        group.update({key: value for key, value in own.items() if key not in ("params", "step")})
    _allocate(optimizer)
    _part_steps(optimizer)
    scheduler.load_state_dict(state["scheduler"])
    for kept, loaded in zip(reference, state.get("reference", ()), strict=True):
        for name, tensor in kept.items():
            tensor.copy_(loaded[name])
    _set_rng(state["rng"])


def _state(
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    reference: Sequence[dict[str, torch.Tensor]],
    topology: Topology,
    loading: bool,
) -> dict[str, Any]:
    """The sharded state dict: what each rank owns, described by global name, shape and offset."""
    _allocate(optimizer)
    _count_padding(optimizer)
    model = {f"model{index}": gpt.sharded_state_dict() for index, gpt in enumerate(chunks)}
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA)),
        "rng": ShardedObject("rng", _rng(), (topology.world_size,), (topology.rank,)),
    }
    if reference:
        state["reference"] = [_described(gpt, tensors) for gpt, tensors in zip(chunks, reference, strict=True)]
    return state


def _described(gpt: GPTModel, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The reference's tensors as the model's own are described."""
    described = gpt.sharded_state_dict(prefix="reference.")
    for name, tensor in reference.items():
        described[f"reference.{name}"].data = tensor
    return {name: described[f"reference.{name}"] for name in reference}


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizer of dense parameters and, where experts have one of their own, that."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _count_padding(optimizer: MegatronOptimizer) -> None:
    """Let DistributedOptimizer gather its buffers as they are.

    megatron 0.16 to 0.19 leaves out the padding between buckets, but then looks for parameters where they are with it:
    with several buckets (tied embeddings under PP have one to themselves) the state it saves is another parameter's.
    """
    for part in _parts(optimizer):
        for buffer in part.buffers if isinstance(part, DistributedOptimizer) else ():
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def _with_torch_adam(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The parts of ``optimizer`` that run torch's AdamW, for want of Transformer Engine and Apex.

    AdamW keeps ``step`` with every parameter, where Transformer Engine's FusedAdam keeps one in each parameter group.
    megatron 0.16 to 0.19 saves and restores AdamW's ``step`` wrongly in four ways; the next functions mend them, and
    leave FusedAdam's alone.
    """
    return [part for part in _parts(optimizer) if isinstance(part.optimizer, torch.optim.AdamW)]


def _allocate(optimizer: MegatronOptimizer) -> None:
    """Give Adam its zero state before the first step: no optimizer can describe itself without."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    for part in _with_torch_adam(optimizer):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _lend(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Let loading find what it looks for.

    ``step`` of AdamW: DistributedOptimizer keeps it elsewhere, the others do not save a step of 0 at all. Groups of
    parameters: from 0.19 on they are known by their learning rates too, which are this configuration's.
    """
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        own: Any = cast(Any, state)[index] if len(parts) > 1 else state  # several parts are known by their numbers
        # Beside float32 main parameters, and in DistributedOptimizer, Adam's state is one level down.
        adam = own.get("optimizer", own)
        for group in adam["param_groups"]:
            group.update({key: part.param_groups[0][key] for key in ("max_lr", "min_lr") if part.param_groups})
        if part not in _with_torch_adam(part):
            continue
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = partial(_set_states, part)
        else:
            adam["state"].setdefault("common_step", torch.tensor(0.0))


def _set_states(part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    own = part._get_main_param_and_optimizer_states(parameter)
    type(part)._set_main_param_and_optimizer_states(part, parameter, {"step": own["step"], **tensors})


def _part_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own ``step`` after DistributedOptimizer.load_state_dict handed all of them one
    tensor.
    """
    for part in _with_torch_adam(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _layout(topology: Topology) -> dict[str, int | None]:
    """The sizes that decide which rank holds what."""
    grid = topology.grid
    return {
        **{"tp": grid.tp, "pp": grid.pp, "dp": topology.dp_size, "cp": grid.cp, "vpp": grid.vpp},
        **{"ep": grid.ep, "etp": grid.expert_tp},
        **{"first_stage_layers": grid.first_stage_layers, "last_stage_layers": grid.last_stage_layers},
    }


def _rng() -> dict[str, Any]:
    """Every generator the learner may draw from. The TP tracker matters as soon as a model has dropout."""
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
