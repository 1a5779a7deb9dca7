"""What the loop asks of a learner.

``megatron_ext.learner`` is the implementation; ``launchers.run.actors`` fans it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.fingerprints import Files
from pipeline.types import StepStats, TrainBatch


class Learner(Protocol):
    """A trainable policy, possibly sharded over ranks.

    Lifecycle: ``load`` or ``restore`` first; then any of ``log_probs``, ``statistics``, ``update``, ``export_shards``,
    ``save``; ``close`` last. Every rank of a sharded learner must make the same calls in the same order.
    """

    def load(self, hf_path: Path) -> None:
        """Read the weights of a Hugging Face folder; also kept as the reference policy when a KL penalty is on."""

    def log_probs(self, batch: TrainBatch, *, reference: bool = False) -> torch.Tensor:
        """T=1 log-probabilities of the targets, float32 ``[targets]`` on CPU. No gradient."""

    def statistics(self, batch: TrainBatch) -> Mapping[str, torch.Tensor]:
        """Of the targets at T=1, float32 ``[targets]`` on CPU, no gradient: ``log_probs``, exact
        ``entropy``, and ``moment``, sum_k pi_k^2 (log pi_k + H) over the vocabulary; nats.
        """

    def update(self, batch: TrainBatch, step: int) -> StepStats:
        """One optimizer step on ``batch``; ``step`` labels the entropy reading."""

    def export_shards(self, version: int) -> Iterator[Any]:
        """The current weights as full tensors under Hugging Face names, one ``WeightBucket`` after another; in FP8 with
        ``rollout.weight_dtype=fp8``.

        A sharded learner's ranks put buckets together at the same time: each rank yields one item a round, the bucket
        that it owns or ``None``, and the buckets of all ranks make up the version. Over Ray the yielded objects are
        opaque handles that an engine's ``load_bucket`` accepts; the driver never holds the bytes.
        """

    def export_size(self) -> tuple[int, int]:
        """Bytes and buckets of one version; the same for every version."""

    def empty_cache(self) -> None:
        """Give back GPU memory that is kept for reuse only: engines on the same GPUs need it."""

    def save(self, directory: Path) -> Callable[[], Files]:
        """Copy parameters, optimizer, schedule and RNG state to the CPU; what is returned writes the copy.

        It is called once, in any thread, while training goes on; it fills ``directory``, which is empty, and returns
        the fingerprint of every file (dist_checkpointing's ``torch_dist``). It has to end before the next ``save``.
        """

    def restore(self, directory: Path, files: Files) -> None:
        """Load what ``save`` wrote, at this learner's own layout.

        ``files``: the fingerprints from writing it; ``DamagedFileError`` names a file that differs, before anything is
        loaded.
        """

    def close(self) -> None:
        """Release processes and process groups."""
