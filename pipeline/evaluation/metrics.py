"""Computes pass@k, maj@k, distinct correct answers and intervals from ``n`` samples of each of ``Q`` questions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_LEVEL = 0.95  # of intervals


def pass_at_k(correct: np.ndarray, n: int, k: int) -> float:
    """Unbiased chance that at least one of ``k`` samples is correct, averaged over questions.

    ``correct``: int [Q], correct ones among the ``n`` samples of each question. mean over q of 1 - C(n-c, k) / C(n, k),
    which is 1 where n - c < k (Chen et al. 2021, arXiv 2107.03374, eq. 1). Raises ``ValueError`` unless 1 <= k <= n.
    """
    return float(_pass_table(n, k)[correct].mean())


def _pass_table(n: int, k: int) -> np.ndarray:
    """float64 [n + 1]: the estimate for c = 0 ... n correct samples."""
    if not 1 <= k <= n:
        raise ValueError(f"evaluation.k={k} must be between 1 and evaluation.samples={n}")
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])


def maj_at_k(answers: Sequence[Sequence[str]], correct: np.ndarray, k: int) -> float:
    """Chance that the most frequent of ``k`` answers is correct, averaged over questions; ties by expectation.

    ``answers``: [Q][n] canonical; ``correct``: bool [Q, n]. The samples are cut into n // k disjoint blocks of k, whose
    mean is unbiased because samples are exchangeable. Where several answers lead, each is the vote's outcome with equal
    chance.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"evaluation.k={k} must be between 1 and evaluation.samples={n}")
    votes = [
        _majority_correct(row[start : start + k], marks[start : start + k])
        for row, marks in zip(answers, correct, strict=True)
        for start in range(0, n - k + 1, k)
    ]
    return float(np.mean(votes))


def _majority_correct(answers: Sequence[str], correct: np.ndarray) -> float:
    marks: dict[str, list[bool]] = defaultdict(list)
    for answer, mark in zip(answers, correct, strict=True):
        marks[answer].append(bool(mark))
    most = max(map(len, marks.values()))
    return float(np.mean([np.mean(group) for group in marks.values() if len(group) == most]))


def distinct_correct(answers: Sequence[Sequence[str]], correct: np.ndarray) -> float:
    """Mean over questions of the number of different correct answers among its samples (shapes as ``maj_at_k``)."""
    counts = [
        len({answer for answer, mark in zip(row, marks, strict=True) if mark})
        for row, marks in zip(answers, correct, strict=True)
    ]
    return float(np.mean(counts))


def pass_interval(correct: np.ndarray, n: int, k: int, *, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of ``pass_at_k`` by the bootstrap: questions are drawn again, then the samples of each.

    Single answers (``n`` = 1), and questions that all pass or all fail, have ``wilson``'s interval over the questions:
    of 30 in 30 the bootstrap would say (1, 1).

    Drawing samples again repeats some, which lowers pass@k for k > 1; the percentile interval is therefore moved so
    that its median is the estimate. Clipped to [0, 1]. The same ``seed`` gives the same interval.
    """
    estimate = pass_at_k(correct, n, k)
    if n == 1 or estimate in (0.0, 1.0):
        return wilson(estimate, len(correct))
    rng = np.random.default_rng(seed)
    questions = rng.integers(len(correct), size=(resamples, len(correct)))
    redrawn = rng.binomial(n, np.asarray(correct)[questions] / n)
    estimates = _pass_table(n, k)[redrawn].mean(axis=1)
    tail = (1 - _LEVEL) / 2
    low, middle, high = np.quantile(estimates, [tail, 0.5, 1 - tail])
    return max(0.0, float(estimate + low - middle)), min(1.0, float(estimate + high - middle))


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of ``count`` yes-or-no answers, also at 0 and 1 (Wilson 1927, JASA 22(158))."""
    z2 = NormalDist().inv_cdf((1 + _LEVEL) / 2) ** 2
    middle, half = share + z2 / (2 * count), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    low, high = ((middle + side * half) / (1 + z2 / count) for side in (-1, 1))
    return min(max(0.0, low), share), max(min(1.0, high), share)
