"""``clip_cov``: no loss on the top share of tokens by Cov(log pi, A), over the global batch; the command is the share.

The threshold form of The Entropy Mechanism's Clip-Cov (arXiv 2505.22617; public code read). Limits and gain measured
here.
"""

from __future__ import annotations

from pipeline.entropy.actuator import Actuator
from pipeline.methods import pi_method

ACTUATOR = Actuator("clip_cov", 0.0, 0.2, 0.0, 0.08, share=True, statistics=True)
METHOD = pi_method("clip_cov", "no loss on the share of tokens of highest covariance")
