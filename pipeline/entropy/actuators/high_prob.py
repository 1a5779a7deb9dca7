"""``high_prob``: A -= u |A| on tokens of probability above 0.95.

From EntroPIC (arXiv 2511.15248; its README and configuration read). The command is u, of either sign: the paper's
coefficient is -u. Limits as published; the gain measured here.
"""

from __future__ import annotations

from pipeline.entropy.actuator import Actuator
from pipeline.methods import pi_method

ACTUATOR = Actuator("high_prob", -1.0, 1.0, 0.0, 1.0, signed=True)
METHOD = pi_method("high_prob", "A -= u |A| on tokens with pi > .95 (EntroPIC's actuator)")
