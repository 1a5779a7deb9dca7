"""The main tokens of a step, flat, with what shapings read and write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeline.types import TrainBatch


@dataclass(frozen=True)
class Tokens:
    """``[n]`` each, row by row; float64 but where said. Log-probabilities and entropies in nats at T=1."""

    log_probs: torch.Tensor
    entropy: torch.Tensor  # exact
    moment: torch.Tensor  # sum_k pi_k^2 (log pi_k + H)
    row: torch.Tensor  # int64
    correct: torch.Tensor  # bool, of the response
    accuracy: torch.Tensor  # share of correct responses to the same prompt
    weights: torch.Tensor  # of the token in the loss
    advantages: torch.Tensor
    scale: torch.Tensor  # further weight, 1 where nobody said otherwise
    marks: torch.Tensor | None = None  # uint8, see ``losses``
    teacher: torch.Tensor | None = None  # log-probabilities of the policy that was shown a peer's correct response

    @classmethod
    def of(cls, batch: TrainBatch, found: Mapping[str, torch.Tensor]) -> Tokens:
        """The main tokens of ``batch``; ``found`` as in ``shape_tokens``."""
        assert batch.groups is not None
        of_target = batch.row_of_target
        main = ~batch.auxiliary[of_target]
        row = of_target[main]
        own = batch.groups[~batch.auxiliary]
        _, index, counts = own.unique(return_inverse=True, return_counts=True)
        right = torch.zeros(len(counts), dtype=torch.float64)
        right.index_add_(0, index, batch.correct[~batch.auxiliary].double())
        accuracy = torch.zeros(batch.rows, dtype=torch.float64)
        accuracy[~batch.auxiliary] = (right / counts)[index]
        return cls(
            log_probs=found["log_probs"][main].double(),
            entropy=found["entropy"][main].double(),
            moment=found["moment"][main].double(),
            row=row,
            correct=batch.correct[row],
            accuracy=accuracy[row],
            weights=batch.weights[row].double(),
            advantages=batch.advantages[row].double(),
            scale=torch.ones(len(row), dtype=torch.float64),
            teacher=found["teacher"][main].double() if "teacher" in found else None,
        )

    @property
    def covariance(self) -> torch.Tensor:
        """(log pi - mean)(A - mean), means over all tokens (arXiv 2505.22617, equation 8)."""
        return (self.log_probs - self.log_probs.mean()) * (self.advantages - self.advantages.mean())

    @property
    def entropy_change(self) -> torch.Tensor:
        """First-order change of a token's own entropy per unit of step size: -A [pi (log pi + H) - sum_k pi_k^2 (log
        pi_k + H)].

        Exact for a tabular softmax whose context is this token's alone (2505.22617 derives the expectation;
        docs/methods.md).
        """
        slope = self.log_probs.exp() * (self.log_probs + self.entropy) - self.moment
        return -self.advantages * self.scale * slope

    def top(self, values: torch.Tensor, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
        """Bool ``[n]``: the ``count`` tokens of largest ``values`` (at most all), of those ``among`` (bool ``[n]``).
        Ties: earlier first.
        """
        if among is not None:
            values = torch.where(among, values, -math.inf)
            count = min(count, int(among.sum()))
        chosen = torch.zeros(len(values), dtype=torch.bool)
        chosen[values.sort(descending=True, stable=True).indices[:count]] = True
        return chosen
