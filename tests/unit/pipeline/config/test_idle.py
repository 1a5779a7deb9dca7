"""``pipeline.config.idle``: what has no effect is told, and what is told has none."""

from operator import attrgetter

import pytest

from pipeline.config.idle import beyond_the_end, idle_keys
from pipeline.config.keys import leaf_keys
from pipeline.config.schema import CONTROLLERS, BandConfig, EntropyConfig, RunConfig
from pipeline.entropy.actuator import acting
from pipeline.entropy.band import build_band
from pipeline.entropy.factory import CONTROLLERS as FILES
from pipeline.entropy.factory import build_controller
from pipeline.registry import load
from pipeline.types import EntropyReading

READINGS = [0.9, 0.5, 0.31, 0.29, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4]
OTHER = {  # a value that is not the default, of the keys whose double or opposite is none or says nothing
    "actuator": "tok",
    "positive_mean": "samples",
    "command_min": 0.9,
    "command_max": 0.4,
    "auxiliary_prompts": 3,
    "auxiliary_max_prompts": 6,
    "pi.kp": 0.7,
    "pi.slew": 0.01,
    "pi.setpoint_ramp": 0.01,
    "pi.dead_band": 0.3,
}

MOVING = {"schedule": "linear", "end_low": 0.1, "end_high": 0.2}

ELSEWHERE = ("alpha", "positive_mean", "auxiliary_samples", "auxiliary_replaces", "controller", "actuator", "band")


def entropy_of(**values):
    """The default section, but for keys whose dots are written ``__``."""
    entropy = EntropyConfig()
    for name, value in values.items():
        *sections, last = name.split("__")
        setattr(attrgetter(".".join(sections))(entropy) if sections else entropy, last, value)
    return entropy


def test_nothing_is_told_of_what_acts():
    assert idle_keys(entropy_of(actuator="tok", command_max=2.0, pi__kp=1.0)) == []
    assert idle_keys(entropy_of(controller="none", repeated_prompts=8)) == []


@pytest.mark.parametrize(
    ("values", "idle", "setting"),
    [
        ({"controller": "none", "actuator": "clip_high"}, "actuator=clip_high", "controller=none"),
        ({"actuator": "tok", "alpha": 3.0}, "alpha=3.0", "actuator=tok"),
        ({"actuator": "fc", "positive_mean": "samples"}, "positive_mean=samples", "actuator=fc"),
        ({"alpha": 0.0, "actuator": "fc", "pi__kp": 1.0}, "pi.kp=1.0", "alpha=0"),
        ({"controller": "skywork", "actuator": "entropy_bonus", "pi__ema": 0.0}, "pi.ema=0.0", "controller=skywork"),
        ({"band__auto_k": 8}, "band.auto_k=8", "band.schedule=constant"),
        (
            {"controller": "aent", "actuator": "entropy_bonus", "aent__most": 0.1, "command_max": 0.2},
            "aent.most=0.1",
            "command_max=0.2",
        ),
        ({"actuator": "resample", "auxiliary_max_prompts": 8}, "auxiliary_max_prompts=8", "pi.split_range=false"),
    ],
)
def test_what_is_told(values, idle, setting):
    (sentence,) = idle_keys(entropy_of(**values))
    assert sentence.startswith(f"entropy.{idle} has no effect with entropy.{setting}: remove, or set entropy.")


@pytest.mark.parametrize(
    ("band", "told"),
    [
        ({"schedule": "piecewise", "points": [[99, 0.1, 0.2], [100, 0.3, 0.4]]}, "points=[100, 0.3, 0.4] has no"),
        ({"schedule": "piecewise", "points": [[9, 0.1, 0.2]]}, ""),
        ({**MOVING, "hold_steps": 50, "schedule_steps": 100}, "until step 150, after the end of this run (steps=100)"),
        ({**MOVING, "schedule_steps": 100}, ""),
        (MOVING, ""),
        ({}, ""),
    ],
)
def test_what_lies_behind_the_end_of_the_run_is_told(band, told):
    found = beyond_the_end(RunConfig(steps=100, entropy=EntropyConfig(band=BandConfig(**band))))
    assert len(found) == bool(told)
    assert told in "".join(found)


def decisions(entropy):
    control = build_controller(entropy, build_band(entropy.band, 100), 16)
    made = [control.initial()]
    for step, value in enumerate(READINGS):
        made.append(control.update(EntropyReading(value, 1.0, step, 0.0), 0 if step == 3 else 2))
    acts = acting(entropy)
    return acts, [(d.command, d.temperature, d.auxiliary_prompts, d.state) for d in made] if acts else None


def other_value(name, key):
    if name in OTHER:
        return OTHER[name]
    return not key.default if isinstance(key.default, bool) else 2 * key.default


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_what_is_told_changes_no_decision(controller):
    """Of the first two actuators that the law can drive. What acts elsewhere is left out."""
    for actuator in load(FILES, controller).MADE_FOR[:2]:
        base = {"controller": controller, "command": 0.1 * (controller == "constant"), "actuator": actuator}
        before = decisions(entropy_of(**base))
        for name, key in leaf_keys(EntropyConfig).items():
            if name != "command" and not name.startswith(ELSEWHERE):
                changed = entropy_of(**base, **{name.replace(".", "__"): other_value(name, key)})
                told = any(f"entropy.{name}=" in sentence for sentence in idle_keys(changed))
                assert not told or decisions(changed) == before, (actuator, name)
