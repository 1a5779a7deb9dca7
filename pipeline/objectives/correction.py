"""Importance weights against the train-inference mismatch: ``objective.correction``.

The engine draws from pi_engine, the learner differentiates pi_learner. With ``rho = pi_learner / pi_engine`` at the
weights that drew the sample (``d`` of ``mismatch``, so ``rho = exp(d)``; ``level: sequence``: ``exp`` of the sum of d
over the whole response):

- ``tis``, truncated: ``min(rho, high)`` (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
  RL training", fengyao.notion.site; truncation: Ionides 2008);
- ``mis``, masked: ``rho`` where ``low <= rho <= high``, else 0 (by sequence: Liu et al. 2025, "When speed kills
  stability: demystifying RL collapse from the training-inference mismatch"; by token: IcePop, arXiv 2510.18855).

The weights carry no gradient. Main rows only: auxiliary rows were drawn at another temperature on purpose, and an
importance weight would cancel just that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from pipeline.config.schema import CorrectionConfig

# What is added up, over tokens or sequences: 1, the weight, its square, and 1 where it was truncated or masked.
SUMS = frozenset({"correction_units", "correction_sum", "correction_square_sum", "correction_outside_sum"})


@torch.no_grad()
def importance_weights(
    log_ratio: torch.Tensor, row: torch.Tensor, main: torch.Tensor, config: CorrectionConfig
) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
    """The weight of every token, and ``SUMS`` for ``metrics``; 1.0 and no sums where the correction is off.

    Args:
        log_ratio: ``[n]``, d; 0 where ``main`` is False.
        row: int64 ``[n]``, the row each token belongs to. All tokens of a row must be here.
        main: bool ``[n]``; other tokens weigh 1 and are not counted.
        config: which weights.

    Returns:
        Float32 ``[n]`` in ``[0, high]``, and detached float64 scalars that add up over parts of a batch. What they
        count is tokens, or sequences at level ``sequence``.
    """
    if config.kind == "none":
        return 1.0, {}
    log_ratio, unit = log_ratio.double(), main.double()
    if config.level == "sequence":
        _, index, lengths = row.unique(return_inverse=True, return_counts=True)
        log_ratio = log_ratio.new_zeros(len(lengths)).index_add(0, index, log_ratio)[index]
        unit = unit / lengths[index]
    ratio = log_ratio.exp()
    outside = ratio > config.high
    if config.kind == "mis":
        outside |= ratio < config.low
        weights = torch.where(outside, 0.0, ratio)
    else:
        weights = ratio.clamp(max=config.high)
    sums = {
        "correction_units": unit.sum(),
        "correction_sum": (unit * weights).sum(),
        "correction_square_sum": (unit * weights.square()).sum(),
        "correction_outside_sum": (unit * outside).sum(),
    }
    return torch.where(main, weights, 1.0).float(), sums


def metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """From added ``SUMS``: the mean weight, the share truncated or masked, and the effective sample size as a share.

    The latter is Kish's (1965), (sum w)^2 / (n sum w^2): 1 where all weights are equal, 0 where all are masked. Empty
    where the correction is off; NaN over nothing.
    """
    if not sums:
        return {}
    units, total, square = (sums[f"correction_{name}"] for name in ("units", "sum", "square_sum"))
    if not units:
        return dict.fromkeys(("correction_weight", "correction_outside", "correction_ess"), math.nan)
    return {
        "correction_weight": total / units,
        "correction_outside": sums["correction_outside_sum"] / units,
        "correction_ess": total**2 / (units * square) if square else 0.0,
    }
