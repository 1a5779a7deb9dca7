"""Who this rank is: tensor-, context-, data- and pipeline-parallel groups, over NCCL or gloo through one code path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from pipeline.model.grid import Grid, Place

# How long a rank waits for the slowest one's disk when a checkpoint is written or checked. A rank that died is noticed
# at once, by its closed connections; a disk that hangs, by the watchdog, when the next checkpoint is due.
COORDINATION_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Topology:
    """One rank's place in the TP x CP x DP x PP grid (TP innermost, PP outermost; megatron's default order).

    ``dp_size`` counts replicas that train on different rows; the ranks of a CP group share theirs. Experts are divided
    otherwise over the same ranks: ``place`` has the coordinates of both grids, ``grid`` the sizes.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    grid: Grid
    coordination: dist.ProcessGroup | None  # gloo, of all ranks, beside the training's; None: there is one rank
    device: torch.device
    backend: str  # "nccl" | "gloo" | "fake" (a rehearsal: no other process is there)

    @property
    def place(self) -> Place:
        """This rank's coordinates, expert-parallel ones included."""
        return self.grid.place(self.rank)

    @property
    def expert_tp_group(self) -> dist.ProcessGroup:
        """Ranks over which each expert of this rank is divided."""
        return parallel_state.get_expert_tensor_parallel_group()

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the output layer, hence the logits."""
        return self.pp_rank == self.pp_size - 1


def initialize(rank: int, address: tuple[str, int], grid: Grid, seed: int) -> Topology:
    """Join the ``grid.world_size`` processes at ``address`` (host and free port of rank 0) and build the parallel
    groups.

    ``seed`` starts every RNG, the TP tracker's too.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        # Megatron orders communication and computation by issue order, which one hardware queue guarantees. CUDA reads
        # this when it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    if address[0] in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a container's host name often does not resolve
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(
        backend, init_method=f"tcp://{address[0]}:{address[1]}", rank=rank, world_size=grid.world_size
    )
    return divide(grid, seed, device)


def divide(grid: Grid, seed: int, device: torch.device) -> Topology:
    """Build the parallel groups of the processes that joined (``initialize``), and start every RNG from ``seed``.

    megatron-core's groups over gloo, beside those of the backend, need real processes: a ``fake`` backend has none.
    """
    backend = dist.get_backend()
    real = backend != "fake"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        context_parallel_size=grid.cp,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.expert_tp,
        create_gloo_process_groups=real,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Topology(
        rank=dist.get_rank(),
        world_size=grid.world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=grid.tp,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=grid.pp,
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=grid.cp,
        cp_group=parallel_state.get_context_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        grid=grid,
        coordination=_coordination() if real and grid.world_size > 1 else None,
        device=device,
        backend=backend,
    )


def _coordination() -> dist.ProcessGroup:
    """Checkpoints are agreed on here, in a thread beside the training, whose collectives must not mix with these."""
    return dist.new_group(backend="gloo", timeout=COORDINATION_TIMEOUT)


def shutdown() -> None:
    """Leave the process groups; ``initialize`` may be called again afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
