"""``dcpo``: A <- (1 - a) A + a 1[R = 1] pi_T / pi (DCPO, arXiv 2601.12730; public code read).

a = x / (1 + x) with x = alpha min(|H0 - H|, 0.1) / accuracy, and a = 0 where no sample is correct. The command is T;
``entropy.alpha`` is alpha. The gain and the upper limit are those of ``reweight``, not measured.
"""

from __future__ import annotations

from pipeline.entropy.actuator import temperature
from pipeline.methods import actuator_method

ACTUATOR = temperature("dcpo", 0.8, 6.0, 2.0)
METHOD = actuator_method(
    "dcpo",
    "2601.12730",
    "A <- (1 - a) A + a 1[R] pi_T / pi, a from min(|H0 - H|, .1) / accuracy",
    "code",
    "scope",
)
