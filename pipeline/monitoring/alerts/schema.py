"""Every key of an alert rule's file, with its default and meaning."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from pipeline.config.key import COUNT, NOT_NEGATIVE, SHARE, key

CLOCK = ("since/", "disk/")  # figures that change with time, not with steps


@dataclass
class ConditionConfig:
    """What is looked at, and when it is so. Everything given must hold."""

    metric: str = key("", "figure: a metric name such as entropy/mean, or one of the engine's own (docs/monitoring.md)")
    smooth: float = key(0.0, "weight of the past in a moving average taken of it first; 0: none", range=SHARE)
    take: str = key(
        "value",
        "what of the figure is compared",
        choices={
            "value": "",
            "mean": "of the last `window`",
            "rate": "slope of its logarithm over the last `window`, per step",
            "of_best": "mean of the last `window`, and two standard errors, over the best such mean so far",
            "of_first": "the same over the first such mean",
        },
    )
    window: int = key(
        1,
        "what `take` and `swings` look at; how long an `event` is remembered",
        range=COUNT,
        unit="steps",
    )
    above: str = key(
        "",
        "holds above this: a number, a metric, or a number * metric; beside `below`: above the one or below the other",
    )
    below: str = key("", "holds below this")
    swings: int = key(
        0,
        "holds after so many passes, within `window`, from above `above` to below `below` or back; 0: off",
        range=NOT_NEGATIVE,
        unit="passes",
    )
    state: str = key("", "holds while the controller is in this state")
    reason: str = key("", "holds while the controller's reason contains this text")
    without: str = key("", "and does not contain this one")
    event: str = key("", "holds from an event of this kind on, for `window` steps")


@dataclass
class ClearConfig:
    """When an alert ends: by default, once its conditions no longer hold."""

    steps: int = key(1, "how many in a row", range=COUNT, unit="steps")
    above: str = key("", "instead: once the figure is above this; form as in `when`")
    below: str = key("", "instead: once the figure is below this")


@dataclass
class RuleConfig:
    """One rule."""

    severity: str = key(MISSING, "how bad it is", choices=("info", "warning", "critical"))
    message: str = key(
        MISSING, "what is wrong; {value}, {bound}, {steps}, {reason}, {description} and {any/metric} are filled in"
    )
    remedy: str = key(MISSING, "what to do about it, one sentence")
    when: ConditionConfig = key(ConditionConfig(), "the condition")
    guard: ConditionConfig = key(ConditionConfig(), "a second condition that must hold as well")
    steps: int = key(1, "how many in a row it must hold", range=COUNT, unit="steps")
    clear: ClearConfig = key(ClearConfig(), "when it is over")
    after: str = key("start", "silent until", choices={"start": "", "entry": "the entropy has been in its band once"})
    settle: int = key(
        0,
        "start: silent for so long; entry: no longer silent after so long (0: until entry)",
        range=NOT_NEGATIVE,
        unit="steps",
    )
    unless: list[str] = key([], "silent while one of these rules is raised, which say it better")
