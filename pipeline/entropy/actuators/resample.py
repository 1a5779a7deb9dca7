"""``resample``: the positive term on correct samples of a second rollout, drawn at T (SCOPE-RL, arXiv 2510.08141).

J = J_GRPO + alpha E[mean over correct samples of min(r, clip(r, 1 - eps, 1 + eps))]. The command is T: correct samples
drawn hot raise the entropy, drawn cold they lower it. Keys: ``entropy.alpha``, ``positive_mean``, ``auxiliary_*``.
Limits and gain measured here. Read: public code of v1 to v6, a secondary summary of v7.
"""

from __future__ import annotations

from pipeline.entropy.actuator import temperature
from pipeline.methods import pi_method

ACTUATOR = temperature("resample", 0.6, 1.6, 3.0, second_rollout=True)
METHOD = pi_method("resample", "correct samples of a second rollout at T")
