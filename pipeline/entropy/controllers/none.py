"""``none``: no control, plain GRPO, with the entropy reported all the same. Its row of the table is that of
``grpo``.
"""

from __future__ import annotations

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import PACKAGE, Actuator
from pipeline.entropy.law import Hold
from pipeline.registry import names

MADE_FOR = names(PACKAGE)  # any; none of them acts


def build(config: EntropyConfig, actuator: Actuator) -> Hold:
    """No command. Also for another controller whose actuator ``entropy.alpha`` 0 switches off."""
    off = config.controller == "none"
    reason = "no entropy control" if off else f"entropy.alpha is 0, so {actuator.name} does nothing: plain GRPO"
    return Hold(1.0, "off", reason)
