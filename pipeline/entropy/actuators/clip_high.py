"""``clip_high``: the loss clips ratios above 1 + clip_high + u; the command is u.

A wider range lets unlikely tokens of good responses grow further in one update. From MAI-Thinking-1's adaptive clipping
(somebody else's public code read: MILES) and ADAPO (arXiv 2603.11682). It acts only where ratios leave 1. The limit is
MAI's; the first gain of the PI law is a guess.
"""

from __future__ import annotations

from pipeline.entropy.actuator import Actuator
from pipeline.methods import OFF_POLICY_STEP, pi_method

ACTUATOR = Actuator("clip_high", 0.0, 2.5, 0.0, 2.5, off_policy=True)
METHOD = pi_method("clip_high", "ratios are clipped above 1 + clip_high + u", OFF_POLICY_STEP)
