"""``stare``: STARE's adaptive schedule of its weight (arXiv 2606.19236, section 4.4; public code read).

For the actuator ``stare``, whose command is u = W - 1: u <- clip(u + 0.01 if H < H* else u - 0.01, 0, 0.5), on only
while H < H* (the paper's gate), with u = 0.1 before the first reading. That is Skywork's law with other numbers. The
published gate and schedule read the entropy of the rows that they are about to train on, ours that of the step before.
Published for 7B: H* = 0.3. The paper's variant C2 also moves M = 1 - u, the weight of the surprising tokens of bad
responses; that is not offered.
"""

from __future__ import annotations

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import Actuator, command_limits
from pipeline.entropy.controllers.skywork import SkyworkLaw
from pipeline.entropy.law import Loop, published_loop
from pipeline.methods import controller_method

MADE_FOR = ("stare",)
METHOD = controller_method(
    "stare_adaptive",
    "2606.19236",
    "while H < H*: x W on positives' 10 % most surprising tokens; W += .01 if H < H* else -.01, in [1, 1.5]",
    "code",
    "entropy.actuator=stare",
    controller="stare",
)
START, STEP, MOST = 0.1, 0.01, 0.5  # of W - 1, as published


def build(config: EntropyConfig, actuator: Actuator) -> Loop:
    """The law up to the configured limit, or the published one."""
    limits = command_limits(config, (0.0, MOST))
    return published_loop(SkyworkLaw(STEP, limits[1], min(START, limits[1])), limits)
