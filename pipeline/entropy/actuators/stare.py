"""``stare``: the loss of the 10 % most surprising tokens of good responses weighs 1 + u; the command is u.

STARE's variant O1 (arXiv 2606.19236; public code read), whose weight is W = 1 + u. The limit is the published largest
W. The first gain of the PI law is a guess.
"""

from __future__ import annotations

from pipeline.entropy.actuator import Actuator
from pipeline.methods import pi_method

ACTUATOR = Actuator("stare", 0.0, 0.5, 0.0, 0.5, statistics=True)
METHOD = pi_method("stare", "x (1 + u) on positives' 10 % most surprising tokens (STARE's actuator)")
