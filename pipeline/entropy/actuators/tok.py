"""``tok``: A += u clip(-(log pi + H_t), -3, 3) on tokens of correct rows; the command is u.

Ours, from small-scale runs: limits and gain measured here. A negative u collapses the policy and is refused.
"""

from __future__ import annotations

from pipeline.entropy.actuator import Actuator
from pipeline.methods import pi_method

ACTUATOR = Actuator("tok", 0.0, 3.0, 0.0, 2.0)
METHOD = pi_method("tok", "A += u c clip(-(log pi + H), -3, 3)")
