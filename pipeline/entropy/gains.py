"""Gains of the PI law: the closed-loop time that they aim at, and ki in proportion to kp."""

from __future__ import annotations

MOMENTUM_STEPS = 3  # by which the optimizer's momentum delays what a command does
# Dead time of the loop without stale rollouts: the decision's own step, momentum, and the mean age of an EMA of weight
# 0.7.
DEAD_TIME = 1 + MOMENTUM_STEPS + 2
CLOSED_LOOP_STEPS = 16.0  # time constant aimed at
KI_PER_KP = 0.036


def proportional_gain(gain: float, staleness: int = 0) -> float:
    """Kp for a plant that moves ln H by ``gain`` per unit of u and step: 1 / (gain (tc + dead time)), internal model
    control.
    """
    return 1 / (gain * (CLOSED_LOOP_STEPS + DEAD_TIME + staleness))


def integral_gain(kp: float) -> float:
    """The ki that goes with ``kp``, to three digits: of the defaults, and of what ``calibrate`` proposes."""
    return float(f"{KI_PER_KP * kp:.3g}")
