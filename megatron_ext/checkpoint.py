"""Learner state in megatron's distributed checkpoint format (``torch_dist``), written by the process that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext import snapshot
from megatron_ext.topology import Topology
from megatron_ext.weights import unpickle
from pipeline import fingerprints
from pipeline.fingerprints import Files

# The distributed optimizer's state as it lies in its buffers: every rank writes its own part, and nothing is gathered.
_METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


class Checkpointer:
    """Saves and restores parameters, optimizer, schedule, RNG states and the reference policy, if any.

    ``chunks`` are this rank's model chunks, ``reference`` as many dictionaries of parameters, or none.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        reference: Sequence[dict[str, torch.Tensor]],
        topology: Topology,
    ) -> None:
        self._chunks, self._optimizer, self._scheduler = chunks, optimizer, scheduler
        self._reference, self._topology = reference, topology
        self._strategy = snapshot.saving(topology)
        self._validated = False

    def save(self, directory: Path) -> Callable[[], Files]:
        """Copy the state to the CPU; what is returned writes it. Both are collectives of all ranks.

        Each rank writes what no other does, and returns the fingerprints of its files.
        """
        directory.mkdir(parents=True, exist_ok=True)
        state = self._state(loading=False)
        force_all_tensors_to_non_fp8(state)  # loading does the same; the optimizer holds what FP8 rounded away
        state["layout"] = _layout(self._topology)
        state["scheduler"] = self._scheduler.state_dict()
        request = dist_checkpointing.save(
            state,
            str(directory),
            self._strategy,
            async_sharded_save=True,
            validate_access_integrity=not self._validated,  # the same for every save of a learner
        )
        self._validated = True
        return partial(_write, cast(Any, request).async_fn, directory, self._topology)

    def restore(self, directory: Path, files: Files) -> None:
        """Load what ``save`` wrote, in place, but for hyper-parameters: those stay as the optimizer was configured.

        Raises ``DamagedFileError`` where a file is not as ``files`` says, and ``ValueError`` where the checkpoint has
        another layout, or would execute code.
        """
        snapshot.check(directory, files, self._topology)
        unpickle.check(directory)
        saved, own = dist_checkpointing.load_common_state_dict(str(directory)).get("layout"), _layout(self._topology)
        if saved != own:
            raise ValueError(f"{directory} was saved by a learner of layout {saved}, this one is {own}: use the same")
        state = dist_checkpointing.load(self._state(loading=True), str(directory), snapshot.loading())
        for index, gpt in enumerate(self._chunks):
            gpt.load_state_dict(state["model"][f"model{index}"])
        self._restore_optimizer(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        for kept, loaded in zip(self._reference, state.get("reference", ()), strict=True):
            for name, tensor in kept.items():
                tensor.copy_(loaded[name])
        _set_rng(state["rng"])

    @torch.no_grad()
    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        optimizer = self._optimizer
        configured = [dict(group) for group in optimizer.param_groups]
        _lend(optimizer, state)
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, configured, strict=True):
            # All but what training changes; the scheduler's own state then sets lr and weight_decay.
            group.update({key: value for key, value in own.items() if key not in ("params", "step")})
        _allocate(optimizer)
        _part_steps(optimizer)

    def _state(self, *, loading: bool) -> dict[str, Any]:
        """The sharded state dict: what each rank owns, described by global name, shape and offset."""
        _allocate(self._optimizer)
        _count_padding(self._optimizer)
        model = {f"model{index}": gpt.sharded_state_dict() for index, gpt in enumerate(self._chunks)}
        rank, world = self._topology.rank, self._topology.world_size
        state: dict[str, Any] = {
            "model": model,
            "optimizer": self._optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA)),
            "rng": ShardedObject("rng", _rng(), (world,), (rank,)),
        }
        if self._reference:
            pairs = zip(self._chunks, self._reference, strict=True)
            state["reference"] = [_described(gpt, tensors) for gpt, tensors in pairs]
        return state


def _write(write: Callable[[], dict[str, Any]], directory: Path, topology: Topology) -> Files:
    """What is left of a save, in any thread. Rank 0 answers for the small files that are of no one rank."""
    files = write()
    if topology.rank == 0:
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
        rest = [path for path in directory.iterdir() if path.suffix != ".distcp" and path.name not in files]
        files |= {path.name: fingerprints.read_back(path) for path in rest}
    return files


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
    """Let DistributedOptimizer describe its buckets with the padding at their end.

    megatron 0.16 to 0.19 leaves that out of a bucket's size, yet a rank whose part ends in padding describes all of it.
    """
    for part in _parts(optimizer):
        for buffer in part.buffers if isinstance(part, DistributedOptimizer) else ():
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
    type(part)._set_main_param_and_optimizer_states(part, parameter, {**tensors, "step": own["step"]})


def _part_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own ``step`` after DistributedOptimizer.load_state_dict handed all of them one
    tensor.
    """
    for part in _with_torch_adam(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _layout(topology: Topology) -> dict[str, int | None]:
    """The sizes that decide which rank holds what."""
    return {**asdict(topology.grid), "etp": topology.grid.expert_tp}


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
