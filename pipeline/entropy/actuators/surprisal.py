"""``surprisal``: A (1 + u s) on tokens with A > 0, A (1 - u s) on those with A < 0, with s = -log pi; never of another
sign.

From REPO-R (arXiv 2603.11682; a public example read). The command is u, of either sign: above 0 unlikely tokens gain
more from good responses and lose less from bad ones. Limits as published; they are too weak for the 100k-parameter
model of configs/recipe/pm4.yaml: in 180 steps it fell from 0.3 to 0.19 nats at the upper limit (one run, ours). The
first gain of the PI law is a guess.
"""

from __future__ import annotations

from pipeline.entropy.actuator import Actuator
from pipeline.methods import pi_method

ACTUATOR = Actuator("surprisal", -0.05, 0.05, 0.0, 0.05, signed=True)
METHOD = pi_method("surprisal", "A x max(0, 1 - u sign(A) log pi) (REPO-R's actuator)")
