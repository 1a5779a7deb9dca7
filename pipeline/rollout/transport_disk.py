"""Sends weights to an SGLang server through a Hugging Face folder on a disk that both see."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.model.folder import is_weights, write_index
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.transport import Deadline
from pipeline.types import WeightBucket


class DiskTransport:
    """``WeightTransport`` by /update_weights_from_disk.

    Every bucket becomes a safetensors shard in ``scratch/version-N.partial``. ``verify`` adds the index, links the rest
    of the model folder (configuration, tokenizer), gives the complete folder its name ``version-N`` in one step and has
    the server load it. The scratch folder exists only during an update; what a killed run left of it goes when the next
    one connects. Each tensor-parallel rank reads the pages of the slices it copies; the disk takes the whole model once
    per update.
    """

    def __init__(self, server: SglangServer, hf_path: Path, scratch: Path) -> None:
        self._server = server
        self._hf_path = hf_path
        self._scratch = scratch
        self._version = 0
        self._shards: dict[str, str] = {}  # tensor -> its file
        self._bytes = 0

    def connect(self, deadline: Deadline) -> None:
        """Remove what a killed run left."""
        self._remove()

    def begin(self, version: int, deadline: Deadline) -> None:
        """Make an empty scratch folder."""
        self._remove()
        self._version, self._shards, self._bytes = version, {}, 0
        self._partial.mkdir(parents=True)

    def send(self, bucket: WeightBucket, deadline: Deadline) -> None:
        """Write one shard."""
        name = f"model-{bucket.index + 1:05d}-of-{bucket.count:05d}.safetensors"
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in bucket.tensors.items()}
        try:
            save_file(tensors, self._partial / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise EngineError(f"{self._partial / name} cannot be written: {error}; make room there") from error
        self._shards |= dict.fromkeys(tensors, name)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        deadline.remaining_s()  # a slow disk is late, too

    def verify(self, deadline: Deadline) -> None:
        """Complete the folder and have the server load it."""
        write_index(self._partial, self._shards, self._bytes)
        for path in self._hf_path.iterdir():
            if path.is_file() and not is_weights(path):
                (self._partial / path.name).symlink_to(path.resolve())
        folder = self._partial.rename(self._scratch / f"version-{self._version}")
        self._server.post(
            "/update_weights_from_disk",
            model_path=str(folder),
            load_format="auto",  # whatever the server was started with
            weight_version=str(self._version),
            timeout_s=deadline.remaining_s(),
        )

    def commit(self) -> None:
        """Remove the folder: the server holds its own copy."""
        self._remove()

    def abort(self) -> None:
        """Remove what was written."""
        self._remove()

    def close(self) -> None:
        """Remove what an unfinished update wrote."""
        self._remove()

    @property
    def _partial(self) -> Path:
        return self._scratch / f"version-{self._version}.partial"

    def _remove(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
