"""What a surrogate may depend on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_LOG_RATIO = 88.0  # nats; float32's exp overflows from 88.7 on


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(log_ratio), finite: beyond ``MAX_LOG_RATIO`` the value at it, without a gradient.

    An infinite ratio that a bound or a mask discards later would still turn the gradient into 0 * inf = NaN.
    """
    return torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))


@dataclass(frozen=True)
class Inputs:
    """``[n]`` each; rows are whole."""

    log_probs: torch.Tensor  # float32, nats at T=1, differentiable
    old: torch.Tensor  # float32, the same before the step's first update; no gradient
    ratio: torch.Tensor  # float32, exp(log_probs - old), see ``ratio_of``
    advantages: torch.Tensor  # float32
    row: torch.Tensor  # int64
    marks: torch.Tensor | None = None  # uint8, what the loss's ``mark`` said of each token; None: nothing

    @property
    def identity(self) -> torch.Tensor:
        """Exactly 1, with the gradient of log pi."""
        return torch.exp(self.log_probs - self.log_probs.detach())

    def marked(self, mark: int) -> torch.Tensor:
        """Bool ``[n]``."""
        if self.marks is None:
            return torch.zeros_like(self.ratio, dtype=torch.bool)
        return self.marks == mark
