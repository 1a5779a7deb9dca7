"""``entropy_bonus``: loss -= u H, with gradient through H; the command is u.

The classic, kept as an honest rival. Limits and gain measured here. Skywork-OR1 and AEnt move this coefficient
(``controllers/skywork.py``, ``controllers/aent.py``); ``controllers/constant.py`` keeps it.
"""

from __future__ import annotations

from pipeline.entropy.actuator import Actuator
from pipeline.methods import pi_method

ACTUATOR = Actuator("entropy_bonus", 0.0, 0.4, 0.0, 0.6)
METHOD = pi_method("entropy_bonus", "loss -= u H")
