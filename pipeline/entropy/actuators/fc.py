"""``fc``: A += alpha (min(pi_T / pi, 8) - 1) on tokens of correct rows, which is zero at T = 1.

Ours, from small-scale runs: limits and gain measured here. The command is T; ``entropy.alpha`` scales the term.
"""

from __future__ import annotations

from pipeline.entropy.actuator import temperature
from pipeline.methods import pi_method

ACTUATOR = temperature("fc", 1.0, 6.0, 2.0)
METHOD = pi_method("fc", "A += c (min(pi_T / pi, 8) - 1)")
