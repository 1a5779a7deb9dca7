"""What an update is predicted to do to the entropy, token by token: the instrument that shows whose push it is.

Let s_t = -dL/d log pi_t be what the loss L pushes the drawn token t by: everything in L that reaches the token through
its log-probability, weights, clipping, shaping, correction and actuators included (an entropy bonus acts through the
entropy itself and is not). For a tabular policy, in which each token's context has logits of its own, plain gradient
descent with learning rate eta moves them by eta s_t (onehot_t - pi), and the entropy of that context by eta times

    -s_t [pi_t (log pi_t + H_t) - sum_k pi_k^2 (log pi_k + H_t)] + O(eta^2)

(arXiv 2505.22617 has the expectation over tokens; this is its value for the token drawn). The sum over tokens is the
metric: the first-order change of sum_t H_t, in nats, per unit of learning rate. A token-mean loss makes it a mean over
tokens of A times the bracket. Shared weights and Adam move tokens that were not drawn, too: signs and shares carry over
to a network, magnitudes do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# Sums over main tokens that ``covariance`` is made of.
COVARIANCE_SUMS = ("log_prob_sum", "advantage_sum", "log_prob_advantage_sum")


def entropy_change_sums(
    loss: torch.Tensor, log_probs: torch.Tensor, entropy: torch.Tensor, moment: torch.Tensor, auxiliary: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Detached float64 scalars that add up over parts of a batch: the metric, and the shares of it.

    ``entropy_change_positive`` and ``_negative`` are those of main tokens that the loss pushes up (s > 0) and down; the
    rest is the auxiliary rows'.

    Args:
        loss: scalar, differentiable with respect to ``log_probs``.
        log_probs, entropy: float32 ``[n]``, nats at T=1.
        moment: float32 ``[n]``, sum_k pi_k^2 (log pi_k + H).
        auxiliary: bool ``[n]``.
    """
    (slope,) = torch.autograd.grad(loss, log_probs, retain_graph=True, allow_unused=True)
    push = torch.zeros_like(moment) if slope is None else -slope
    log_p, h = log_probs.detach().double(), entropy.detach().double()
    change = -push.double() * (log_p.exp() * (log_p + h) - moment.double())
    main = torch.where(auxiliary, 0.0, change)
    return {
        "entropy_change": change.sum(),
        "entropy_change_positive": torch.where(push > 0, main, 0.0).sum(),
        "entropy_change_negative": torch.where(push < 0, main, 0.0).sum(),
        "entropy_change_auxiliary": torch.where(auxiliary, change, 0.0).sum(),
    }


@torch.no_grad()
def covariance_sums(log_probs: torch.Tensor, advantages: torch.Tensor, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """``COVARIANCE_SUMS`` over the tokens of ``main``, float64."""
    x = torch.where(main, log_probs.double(), 0.0)
    y = torch.where(main, advantages.double(), 0.0)
    return dict(zip(COVARIANCE_SUMS, (x.sum(), y.sum(), (x * y).sum()), strict=True))


def covariance(sums: Sequence[float], tokens: float) -> float:
    """Cov(log pi, A) over main tokens from added ``COVARIANCE_SUMS``, nats times advantage; NaN over none.

    Under a natural gradient dH = -eta Cov (arXiv 2505.22617).
    """
    if not tokens:
        return math.nan
    log_probs, advantages, products = (each / tokens for each in sums)
    return products - log_probs * advantages
