"""``reweight``: the positive term of ``resample`` on the correct main rows, each token weighted by pi_T / pi.

No second rollout (DCPO's idea, arXiv 2601.12730; public code read). The command is T; ``entropy.alpha`` scales the
term. Limits and gain measured here.
"""

from __future__ import annotations

from pipeline.entropy.actuator import temperature
from pipeline.methods import pi_method

ACTUATOR = temperature("reweight", 1.0, 6.0, 2.0)
METHOD = pi_method("reweight", "correct main rows weighted by pi_T / pi")
