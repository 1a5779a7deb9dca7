"""What entropy control cost a run in reward: against a run without control, over as many generated tokens."""

from __future__ import annotations

import math

import numpy as np

from pipeline.monitoring.summary import RunHistory

ROLES = ("main", "auxiliary", "repeated")


def generated(run: RunHistory) -> np.ndarray:
    """Response tokens generated before each step, and after the last: ``[steps + 1]``."""
    tokens = sum(np.nan_to_num(run.column(f"tokens/{role}")) for role in ROLES)
    return np.concatenate([[0.0], np.cumsum(tokens)])


def reward_cost(run: RunHistory, baseline: RunHistory) -> float:
    """Share of the baseline's reward area that the run lost, over the tokens that both have generated; NaN without any.

    (AUC of the baseline's reward - AUC of the run's) / AUC of the baseline's.
    """
    ours, theirs = generated(run), generated(baseline)
    budget = min(ours[-1], theirs[-1])
    area = _reward_area(baseline, theirs, budget)
    return (area - _reward_area(run, ours, budget)) / area if area else math.nan


def _reward_area(run: RunHistory, tokens: np.ndarray, budget: float) -> float:
    """Reward, summed over generated tokens up to ``budget``; the step that exceeds it counts in part."""
    return float(np.diff(np.minimum(tokens, budget)) @ np.nan_to_num(run.column("reward/mean")))
