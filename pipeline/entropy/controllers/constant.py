"""``constant``: no loop. The actuator's command stays what ``entropy.command`` says, as a fixed entropy bonus
has it.
"""

from __future__ import annotations

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.actuator import PACKAGE, Actuator
from pipeline.entropy.law import Hold
from pipeline.methods import actuator_method
from pipeline.registry import names

MADE_FOR = names(PACKAGE)  # any
METHOD = actuator_method(
    "entropy_bonus",
    "-",
    "loss -= .01 H, constant (the coefficient is ours)",
    "ours",
    "constant",
    "entropy.command=0.01",
)


def build(config: EntropyConfig, actuator: Actuator) -> Hold:
    """The configured command."""
    return Hold(config.command, "holding", "constant command")
