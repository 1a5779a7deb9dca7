"""Pass@k: what a sample adds to the chance that one of k is right."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from pipeline.config.schema import ObjectiveConfig
from pipeline.methods import advantage_method
from pipeline.objectives.advantages._standard import EPSILON, standardised

METHOD = advantage_method("pass_at_k", "2508.10751", "A = A_grpo / 2 + A_k / 2, A_k the analytic advantage of pass@4")


def advantages(
    groups: Sequence[np.ndarray], correct: Sequence[np.ndarray], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """A = (1 - share) A_grpo + share A_k, with the analytic advantage A_k of arXiv 2508.10751, section 2.4.

    With c correct of G and pk = 1 - C(G-c, k) / C(G, k), the mean and variance of "one of k is right" over subsets of
    size k are pk and pk (1 - pk); s = sqrt(pk (1 - pk)) + 1e-4. A_k = (1 - pk) / s for a correct sample, since every
    subset with it passes, else (1 - C(G-c-1, k-1) / C(G-1, k-1) - pk) / s. A sample whose length is penalised stays
    correct. Defaults: k (``samples``) 4, share 0.5 (measured small-scale, ours). A group in which every subset passes
    or none gives A_k = 0; so does one of fewer than k samples.
    """
    share = objective.pass_at_k.share
    return [
        (1 - share) * standardised(rewards) + share * _analytic(marks, objective.pass_at_k.samples)
        for rewards, marks in zip(groups, correct, strict=True)
    ]


def _analytic(correct: np.ndarray, k: int) -> np.ndarray:
    count, right = len(correct), int(correct.sum())
    if count < k:
        return np.zeros(count)
    mean = 1 - comb(count - right, k) / comb(count, k)
    if mean in (0.0, 1.0):
        return np.zeros(count)
    spread = (mean * (1 - mean)) ** 0.5 + EPSILON
    if_wrong = 1 - comb(count - right - 1, k - 1) / comb(count - 1, k - 1)
    return np.where(correct, 1 - mean, if_wrong - mean) / spread
