"""Takes weights into an SGLang server through a Hugging Face folder on a disk that both see."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.model.folder import Files, is_weights
from pipeline.model.fp8 import CODES
from pipeline.model.fp8_layout import scale_name, scale_shape
from pipeline.reshard.execute import EngineShards
from pipeline.reshard.messages import DTYPES
from pipeline.reshard.order import Order
from pipeline.reshard.participant import Participant
from pipeline.reshard.places import Places
from pipeline.reshard.plan import Plan
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.transport import Deadline

_FILE_BYTES = 4 << 30


class DiskTransport:
    """``WeightTransport`` by /update_weights_from_disk.

    This process receives whole tensors, as an engine of one rank, straight into the pages of safetensors files in
    ``scratch/version-N.partial``. ``verify`` links the rest of the model folder (configuration, tokenizer), gives the
    complete folder its name ``version-N`` in one step and has the server load it. ``commit``, ``abort`` and ``close``
    remove it, and the next start removes what a killed run left. Each rank of the server reads the pages of its slices;
    the disk takes the whole model once per engine.
    """

    def __init__(self, server: SglangServer, hf_path: Path, scratch: Path) -> None:
        """``hf_path``: the model folder.

        ``scratch``: a folder of this engine's own, on the run's file system.
        """
        self._server, self._hf_path, self._scratch = server, hf_path, scratch
        self._participant = Participant()
        self._remove()  # what a killed run left

    def begin(self, deadline: Deadline) -> None:
        """Make room."""
        self._remove()

    def receive(self, order: Order, engine: int, deadline: Deadline) -> None:
        """Fill the files."""
        partial = self._scratch / f"version-{order.version}.partial"
        partial.mkdir(parents=True)
        places = _Pages(partial)
        report = self._participant.receive(order, engine, places)
        if report.error:
            raise EngineError(report.error)

    def verify(self, order: Order, deadline: Deadline) -> None:
        """Complete the folder and have the server load it."""
        partial = self._scratch / f"version-{order.version}.partial"
        for path in self._hf_path.iterdir():
            if path.is_file() and not is_weights(path):
                (partial / path.name).symlink_to(path.resolve())
        folder = partial.rename(self._scratch / f"version-{order.version}")
        self._server.post(
            "/update_weights_from_disk",
            model_path=str(folder),
            load_format="auto",  # whatever the server was started with
            weight_version=str(order.version),
            timeout_s=deadline.remaining_s(),
        )

    def commit(self) -> None:
        """Remove the folder: the server holds its own copy."""
        self._remove()

    def abort(self) -> None:
        """Remove what was written."""
        self._remove()

    def close(self) -> None:
        """Remove what an unfinished update wrote, and leave the group."""
        self._participant.close()
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)


class _Pages(Places):
    """The files of a Hugging Face folder, mapped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(self._mapped)
        self._folder = folder
        self._files: Files | None = None

    def shards(self, plan: Plan, process: int) -> EngineShards:
        """See ``Places``. Raises ``OSError`` when the disk is full."""
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for tensor in plan.tensors:
            tensors[tensor.name] = DTYPES[tensor.item_size], tensor.shape
            if tensor.quantise == "after":
                tensors[tensor.name] = CODES, tensor.shape
                tensors[scale_name(tensor.name)] = torch.float32, scale_shape(tensor.shape)
        self._files = Files(self._folder, tensors, _FILE_BYTES)
        self._files.allocate()
        return super().shards(plan, process)

    def _mapped(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        assert self._files is not None  # shards() made it
        entry = self._files.entries[name]
        path = self._folder / entry.file
        pages = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
        return pages[entry.start : entry.start + entry.nbytes].view(dtype).view(list(shape))
