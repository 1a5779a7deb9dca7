"""Copies a learner's sharded state to the CPU, writes the copy as ``torch_dist`` files, checks and reads them again.

megatron-core's own asynchronous writer forks processes under a spawned manager, which hangs in scripts without a main
guard and is unsafe inside Ray actors; here a thread of the rank's process writes. The files are the same, and are read
by the upstream loader (0.16 to 0.19).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_ext.topology import Topology
from pipeline import fingerprints
from pipeline.fingerprints import DamagedFileError, Files, Fingerprint, SummedFile


def saving(topology: Topology) -> FullyParallelSaveStrategyWrapper:
    """How to save: what DP ranks hold alike is divided between them. The division is worked out with the first save."""
    return FullyParallelSaveStrategyWrapper(_Snapshot(topology.coordination), _replicas(), do_cache_distribution=True)


def loading() -> FullyParallelLoadStrategyWrapper:
    """How to load: each of the DP ranks that need the same reads a part of it, and hands it to the others."""
    return FullyParallelLoadStrategyWrapper(_LoadAlone(), _replicas())


def check(directory: Path, files: Files, topology: Topology) -> None:
    """Compare ``files`` with what is in ``directory``, each rank those that it wrote. A collective of all ranks.

    Raises ``DamagedFileError`` on all of them, before anything is loaded.
    """
    world = topology.world_size
    own = [name for name in files if _writer(name) % world == topology.rank]
    said: list[str | None] = [None] * world
    try:
        fingerprints.check_contents(directory, files, own)
    except DamagedFileError as error:
        said[topology.rank] = str(error)
    if world > 1:
        dist.all_gather_object(said, said[topology.rank], group=topology.coordination)
    if damage := next(filter(None, said), None):
        raise DamagedFileError(damage)


def _replicas() -> dist.ProcessGroup:
    """The ranks of a stage and TP rank, which hold the same dense parameters."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _writer(name: str) -> int:
    """The rank that wrote a file: ``__3_0.distcp`` is of rank 3, what is not of one rank was written by rank 0."""
    rank = name.removeprefix("__").partition("_")[0]
    return int(rank) if name.endswith(".distcp") and rank.isdecimal() else 0


class _Snapshot(torch_dist.TorchDistSaveShardedStrategy):
    """megatron's ``torch_dist`` writer in two parts: a copy on the CPU now, and files by whoever calls the request.

    The request's function returns the fingerprints of the files that this rank wrote. It is a collective over
    ``group``, of a backend that other threads of the process do not use.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__("torch_dist", 1)
        self._group = group

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *upstream: str) -> AsyncRequest:
        """Copy what this rank is to write. ``upstream``: which of its own writers 0.19 would take."""
        parts, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        for part in chain.from_iterable(parts.values()):
            if isinstance(part, ShardedTensor):
                part.data = torch.empty(part.data.shape, dtype=part.data.dtype).copy_(part.data.detach())
        state = torch_dist.mcore_to_pyt_state_dict(parts, False)
        return AsyncRequest(partial(_write, state, Path(checkpoint_dir), self._group), (), [])


def _write(state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None) -> dict[str, Fingerprint]:
    writer = dcp.FileSystemWriter(directory, per_thread_copy_ahead=0)  # all of it is on the CPU
    writer.fs = files = _SummingFiles()
    try:
        dcp.save(
            state,
            storage_writer=writer,
            planner=torch_dist.MCoreSavePlanner(flatten_state_dict=False),
            process_group=group,
        )
    except CheckpointException as error:  # a BaseException, which nobody expects
        said = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise RuntimeError(f"{directory} could not be written: {said}") from error
    return files.written


class _SummingFiles(FileSystem):
    """Files that are summed while they are written."""

    def __init__(self) -> None:
        self.written: dict[str, Fingerprint] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """A new file; nothing here is read."""
        with SummedFile(Path(path)) as file:
            yield file  # which the writer flushes to the disk and closes
            self.written[Path(path).name] = file.fingerprint()

    def rename(self, path: Any, new_path: Any) -> None:
        """The fingerprint goes with the file."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _LoadAlone(torch_dist.TorchDistLoadShardedStrategy):
    """megatron's reader, every rank for itself, as from 0.19 on.

    0.16 has the ranks wait for each other over the default group, hence no longer than NCCL's ten minutes.
    """

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *upstream: str) -> dict[str, Any]:
        """See upstream."""
        coordinated = dcp.load_state_dict
        dcp.load_state_dict = partial(coordinated, no_dist=True)  # core/dist_checkpointing/strategies/torch.py
        try:
            return super().load(sharded_state_dict, checkpoint_dir, *upstream)
        finally:
            dcp.load_state_dict = coordinated
