"""Finds keys of ``entropy`` that are set and cannot act: the controller or actuator does not look at them, or the run
ends before.

They are told, not refused: a recipe is often run under another controller, and without one for comparison, and a run
may be lengthened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.entropy_rules import ACTUATORS
from pipeline.config.keys import leaf_keys
from pipeline.config.schema import EntropyConfig, PiConfig, RunConfig
from pipeline.registry import load

_OF_NO_LAW = ("controller", "band", "band_of", "repeated_prompts")  # they say what is measured and reported
_OF_PI = tuple(f"pi.{name}" for name in vars(PiConfig()) if name != "saturation_steps")


@dataclass(frozen=True)
class _Need:
    """``keys`` (or whole sections) act where ``met``; ``setting`` is why they do not, ``other`` what would let them."""

    met: bool
    keys: tuple[str, ...]
    setting: str
    other: str


def idle_keys(entropy: EntropyConfig) -> list[str]:
    """A sentence for each reason why keys that differ from their defaults have no effect, with them and a remedy."""
    told: set[str] = set()
    sentences = []
    for need in _needs(entropy):
        idle = {} if need.met else {name: value for name, value in _set(entropy, need.keys) if name not in told}
        told |= idle.keys()
        if idle:
            named = ", ".join(f"entropy.{name}={value}" for name, value in idle.items())
            verb = "has" if len(idle) == 1 else "have"
            sentences.append(f"{named} {verb} no effect with {need.setting}: remove, or set {need.other}")
    return sentences


def beyond_the_end(config: RunConfig) -> list[str]:
    """A sentence about each part of the band's course that lies behind the run's last step, and a remedy."""
    band, steps = config.entropy.band, config.steps
    remedy = f"has no effect before the run is lengthened beyond steps={steps}"
    late = [", ".join(f"{number:g}" for number in point) for point in band.points if point[0] >= steps]
    found = [f"entropy.band.points=[{point}] {remedy}" for point in late]
    end = band.hold_steps + band.schedule_steps
    if band.schedule_steps and end > steps:
        found.append(
            f"entropy.band.schedule_steps={band.schedule_steps} moves the band until step {end}, after the end of this "
            f"run (steps={steps}), which never sees end_low and end_high; lower it, or lengthen the run"
        )
    return found


def _needs(entropy: EntropyConfig) -> Iterator[_Need]:
    actuator = load(ACTUATORS, entropy.actuator).ACTUATOR
    law, acts_through = f"entropy.controller={entropy.controller}", f"entropy.actuator={entropy.actuator}"
    every = tuple(name for name in vars(entropy) if name not in _OF_NO_LAW)
    yield _Need(entropy.controller != "none", every, law, "entropy.controller=pi")
    off = actuator.positive_term and entropy.alpha == 0
    yield _Need(
        not off, tuple(n for n in every if n not in ("alpha", "actuator")), "entropy.alpha=0", "entropy.alpha=1"
    )
    yield _Need(actuator.positive_term, ("alpha",), acts_through, "entropy.actuator=reweight, resample, fc or dcpo")
    averaged = entropy.actuator in ("reweight", "resample")
    yield _Need(averaged, ("positive_mean",), acts_through, "entropy.actuator=reweight or resample")
    drawn = ("auxiliary_prompts", "auxiliary_samples", "auxiliary_max_prompts")
    yield _Need(actuator.second_rollout, drawn, acts_through, "entropy.actuator=resample")
    split = entropy.pi.split_range
    yield _Need(split, ("auxiliary_max_prompts",), "entropy.pi.split_range=false", "entropy.pi.split_range=true")
    looped = ("command_min", "command_max", "pi.saturation_steps")
    yield _Need(entropy.controller != "constant", looped, law, "entropy.controller=pi")
    yield _Need(entropy.controller == "pi", _OF_PI, law, "entropy.controller=pi")
    for other in ("skywork", "aent", "entropic"):
        yield _Need(entropy.controller == other, (other,), law, f"entropy.controller={other}")
    limit = f"entropy.command_max={entropy.command_max:g}"
    yield _Need(not entropy.command_max, ("skywork.upper", "aent.most"), limit, "entropy.command_max=0")
    schedule = f"entropy.band.schedule={entropy.band.schedule}"
    yield _Need(entropy.band.schedule == "auto", ("band.auto_k",), schedule, "entropy.band.schedule=auto")


def _set(entropy: EntropyConfig, keys: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    """Keys below ``entropy``, of those named or in a section named, whose value is not the default."""
    for name, key in leaf_keys(EntropyConfig).items():
        value: object = entropy
        for part in name.split("."):
            value = getattr(value, part)
        if value != key.default and any(name == of or name.startswith(f"{of}.") for of in keys):
            yield name, value
