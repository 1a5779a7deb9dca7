"""The policy's head: from the decoder's last hidden states to log-probs and entropy of chosen targets.

Megatron's output layer never runs. It would compute logits of every position, prompts and padding included, and keep
them whole; they would be by far the largest tensor of a step. Here hidden states are selected first, and the projection
is part of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from megatron_ext.logprobs import Outputs, linear_log_probs_and_entropy, log_probs_and_entropy

KERNELS = ("auto", "fused", "torch", "triton")


class Head:
    """What stands in for the output layer of ``gpt``; does nothing on a stage without one."""

    def __init__(
        self, gpt: GPTModel, vocab_size: int, group: dist.ProcessGroup, device: torch.device, kernel: str
    ) -> None:
        """``vocab_size`` without padding; ``group`` is the tensor-parallel group; ``kernel`` is
        ``learner.log_prob_kernel``.

        Raises ``ValueError`` on a kernel that this device cannot run.
        """
        if kernel not in KERNELS:
            raise ValueError(f"learner.log_prob_kernel={kernel!r} is not known; choose one of {', '.join(KERNELS)}")
        if kernel == "triton" and device.type != "cuda":
            raise ValueError(
                f"learner.log_prob_kernel=triton needs a CUDA device, the learner is on {device}: choose auto, fused "
                "or torch"
            )
        self._gpt, self._vocab_size, self._group = gpt, vocab_size, group
        self._fused = kernel in ("auto", "fused")
        self._kernel = "auto" if self._fused else kernel

    @contextmanager
    def selecting(self, mask: torch.Tensor) -> Iterator[None]:
        """Within, the model returns the hidden states ``[1, n, hidden]`` where ``mask`` is True, row-major, in place of
        logits.

        ``mask``: bool ``[rows, seq]``, over the positions that this rank was given (all of a row's under sequence
        parallelism, its own part of them under context parallelism).
        """
        if not self._gpt.post_process:
            yield
            return

        def select(hidden: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
            if self._gpt.config.sequence_parallel:  # [seq / tp, rows, hidden]; backward reduces and scatters
                return gather_from_sequence_parallel_region(hidden, group=self._group).transpose(0, 1)[mask][
                    :, None
                ], None
            chosen = hidden.transpose(0, 1)[mask]
            return copy_to_tensor_model_parallel_region(chosen, group=self._group)[
                :, None
            ], None  # backward all-reduces

        layer = self._gpt.output_layer
        layer.forward = select  # not the layer itself: hooks on its call gather parameters over DP
        try:
            yield
        finally:
            del layer.forward

    def __call__(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float | None,
        entropy_grad: bool,
        moment: bool = False,
    ) -> Outputs:
        """What ``logprobs`` says of ``targets`` ``[n]``, from what the model returned."""
        options: dict[str, Any] = {
            "vocab_size": self._vocab_size,
            "group": self._group,
            "temperature": temperature,
            "entropy_grad": entropy_grad,
            "moment": moment,
            "kernel": self._kernel,
        }
        if self._fused:
            return linear_log_probs_and_entropy(hidden[0], self._weight, targets, **options)
        return log_probs_and_entropy(torch.nn.functional.linear(hidden[0], self._weight), targets, **options)

    @property
    def _weight(self) -> torch.Tensor:
        """``[padded vocabulary / tp, hidden]``: the embedding's where tied (its copy on a last stage of its own)."""
        gpt = self._gpt
        if gpt.share_embeddings_and_output_weights:
            return gpt.shared_embedding_or_output_weight()
        return gpt.output_layer.weight
