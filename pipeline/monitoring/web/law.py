"""The law R = -a exp(H) + b of policy entropy H and reward R (arXiv 2505.22617), fitted to one run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Law:
    """A least-squares fit, and how far to trust it."""

    a: float
    b: float
    rmse: float  # of the reward, over the points fitted
    r_squared: float
    low: float  # smallest and largest entropy fitted, nats per token
    high: float
    points: int

    @property
    def ceiling(self) -> float:
        """The reward that the law predicts at entropy 0."""
        return self.b - self.a


def fit_law(entropy: np.ndarray, reward: np.ndarray) -> Law | None:
    """Fit two arrays [n] (entropy in nats per token); pairs with NaN are left out. None for fewer than 3 different entropies.

    The law was found on runs without intervention; after one, no clear relation is known to hold.
    """
    known = np.isfinite(entropy) & np.isfinite(reward)
    x, y = np.exp(entropy[known]), reward[known]
    if len(np.unique(x)) < 3:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    spread = float(((y - y.mean()) ** 2).sum())
    return Law(
        a=-float(slope),
        b=float(intercept),
        rmse=float(np.sqrt((residual**2).mean())),
        r_squared=1 - float((residual**2).sum()) / spread if spread > 0 else 1.0,
        low=float(np.log(x.min())),
        high=float(np.log(x.max())),
        points=len(x),
    )
