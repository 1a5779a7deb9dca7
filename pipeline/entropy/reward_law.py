"""The law of The Entropy Mechanism (arXiv 2505.22617): over a run, reward R = -a exp(H) + b, so that b - a is the
ceiling at H = 0.

The paper finds that the first 15 % of a run predict the rest. It speaks of runs whose entropy falls by itself: once
something holds the entropy no such relation holds, and the law must not be used to choose a target while a controller
acts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.student import t95

EARLY = 0.15  # share of a run that predicts the rest
LEAST_POINTS = 8
BLOCKS = 80  # points that a long run is averaged to: noise in H would flatten the slope


@dataclass(frozen=True)
class RewardLaw:
    """A least-squares fit. Intervals are 95 %, residuals taken as independent."""

    a: float
    a_interval: tuple[float, float]
    b: float
    b_interval: tuple[float, float]
    ceiling: float  # b - a, the reward predicted at H = 0
    ceiling_interval: tuple[float, float]
    residual: float  # root mean square, of the fit to all points
    entropies: tuple[float, float]  # lowest and highest that were fitted, nats
    points: int
    early_error: float  # root mean square over the rest of what the first 15 % predict; NaN where those are too few
    early_ceiling: float  # b - a as the first 15 % have it


def fit_reward_law(entropy: Sequence[float], reward: Sequence[float]) -> RewardLaw:
    """Fit one run, an entry per step in order; pairs that are not finite are left out. Raises ``ValueError`` on too few
    points.
    """
    pairs = np.array([entropy, reward], float)
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    if pairs.shape[1] < LEAST_POINTS:
        raise ValueError(f"{pairs.shape[1]} steps with an entropy and a reward: the law needs at least {LEAST_POINTS}")
    first, size = math.ceil(EARLY * pairs.shape[1]), math.ceil(pairs.shape[1] / BLOCKS)
    early, rest, points = (_averaged(part, size) for part in (pairs[:, :first], pairs[:, first:], pairs))
    a, b, covariance, residual = _least_squares(points)
    reach = t95(points.shape[1] - 2)

    def interval(value: float, weights: tuple[float, float]) -> tuple[float, float]:
        w = np.array(weights)
        half = reach * math.sqrt(max(0.0, float(w @ covariance @ w)))
        return value - half, value + half

    early_a, early_b = _least_squares(early)[:2] if early.shape[1] >= 3 else (math.nan, math.nan)
    errors = rest[1] - (early_b - early_a * np.exp(rest[0]))
    return RewardLaw(
        a=a,
        a_interval=interval(a, (1, 0)),
        b=b,
        b_interval=interval(b, (0, 1)),
        ceiling=b - a,
        ceiling_interval=interval(b - a, (-1, 1)),
        residual=residual,
        entropies=(float(points[0].min()), float(points[0].max())),
        points=points.shape[1],
        early_error=float(np.sqrt((errors**2).mean())),
        early_ceiling=early_b - early_a,
    )


def _averaged(pairs: np.ndarray, size: int) -> np.ndarray:
    """Means of ``size`` consecutive entries each; of the last ones, of what is left."""
    return np.stack([pairs[:, i : i + size].mean(axis=1) for i in range(0, pairs.shape[1], size)], axis=1)


def _least_squares(points: np.ndarray) -> tuple[float, float, np.ndarray, float]:
    """a, b, their covariance and the root mean square residual."""
    design = np.stack([-np.exp(points[0]), np.ones(points.shape[1])], axis=1)
    (a, b), *_ = np.linalg.lstsq(design, points[1], rcond=None)
    residual = points[1] - design @ np.array([a, b])
    free = max(1, len(residual) - 2)
    covariance = float(residual @ residual) / free * np.linalg.pinv(design.T @ design)
    return float(a), float(b), covariance, float(np.sqrt((residual**2).mean()))
