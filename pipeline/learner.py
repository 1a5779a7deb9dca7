"""What the loop asks of a learner.

``megatron_ext.learner`` is the implementation; ``launchers.run.actors`` fans it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from pipeline.fingerprints import Files
from pipeline.reshard.order import Order
from pipeline.types import StepStats, TrainBatch


class Learner(Protocol):
    """A trainable policy, possibly sharded over ranks.

    Lifecycle: ``load`` or ``restore`` first; then any of ``log_probs``, ``statistics``, ``update``, ``send``,
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

    def meeting_point(self, *, one_machine: bool) -> tuple[str, int]:
        """Host and port of the TCPStore where the processes of a weight update meet; rank 0 keeps it.

        ``one_machine``: all of them run on one.
        """

    def send(self, order: Order) -> None:
        """Send the current weights, as every rank's part of the order's plan says, straight from the parameters.

        Returns when all ranks have sent theirs. Raises ``RuntimeError`` when a process is lost or late, ``ValueError``
        when it made another plan.
        """

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
