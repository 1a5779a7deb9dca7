"""Rules between keys of ``entropy``: the band, the command's limits, and which law drives which actuator."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.errors import Problem
from pipeline.config.rollout_rules import DETERMINISTIC
from pipeline.config.schema import EVALUATIONS_FOR_A_BAND, EntropyConfig, RunConfig
from pipeline.registry import load

ACTUATORS, CONTROLLERS = "pipeline.entropy.actuators", "pipeline.entropy.controllers"  # what their files say of them

_EDGES = "an edge at or below zero, or low not below high"


def entropy_problems(config: RunConfig) -> Iterator[Problem]:
    """Every combination of entropy keys that cannot work, or in which one of them would have no effect."""
    yield from _band(config)
    yield from _limits(config.entropy)
    yield from _controller(config.entropy)
    yield from _auxiliary(config.entropy, config.rollout.prompts_per_step)
    yield from _repeated_prompts(config)
    yield from _constant(config)
    yield from _off_policy(config)


def _band(config: RunConfig) -> Iterator[Problem]:
    band = config.entropy.band
    if band.low >= band.high:
        yield Problem(
            "entropy.band.low", band.low, f"not below entropy.band.high ({band.high:g})", "swap or widen them"
        )
    moving = band.schedule in ("linear", "cosine")
    if moving and not 0 < band.end_low < band.end_high:
        yield Problem(
            "entropy.band.end_low",
            band.end_low,
            f"the {band.schedule} schedule ends at [{band.end_low:g}, {band.end_high:g}]: {_EDGES}",
            "set end_low and end_high with 0 < end_low < end_high",
        )
    if moving and band.hold_steps >= config.steps:
        yield Problem(
            "entropy.band.hold_steps",
            band.hold_steps,
            f"the band would never move within steps={config.steps}",
            "hold it for fewer steps, or train longer",
        )
    if not moving and (band.end_low or band.end_high or band.hold_steps or band.schedule_steps):
        yield Problem(
            "entropy.band.schedule",
            band.schedule,
            "end_low, end_high, hold_steps and schedule_steps have no effect with this schedule",
            "set schedule to linear or cosine, or remove them",
        )
    if band.schedule == "auto":
        yield from _auto(config)
    yield from _points(config)


def _points(config: RunConfig) -> Iterator[Problem]:
    """What a band that jumps needs."""
    band, key = config.entropy.band, "entropy.band.points"
    if (band.schedule == "piecewise") != bool(band.points):
        problem = "piecewise needs points" if not band.points else f"points have no effect with {band.schedule}"
        yield Problem(key, band.points, problem, "set schedule=piecewise and points=[[step, low, high], ...]")
    for point in band.points:
        if len(point) != 3 or point[0] < 0 or point[0] != int(point[0]) or not 0 < point[1] < point[2]:
            remedy = "write [step, low, high] with a whole step and 0 < low < high"
            yield Problem(key, point, f"not [step, low, high], {_EDGES}", remedy)
    steps = [point[0] for point in band.points if point]
    if steps != sorted(set(steps)):
        yield Problem(key, band.points, "steps do not increase", "sort the points by step, each once")
    elif steps and steps[0] >= config.steps:
        problem = f"the band would never move within steps={config.steps}"
        yield Problem(key, band.points, problem, "let a point begin earlier, or train longer")


def _auto(config: RunConfig) -> Iterator[Problem]:
    """What a band that is read from evaluations needs."""
    place, evaluation = "entropy.band.schedule", config.evaluation
    every = f"set evaluation.every={max(1, config.steps // 12)}"
    longer = f"train for more than {EVALUATIONS_FOR_A_BAND * max(1, evaluation.every)} steps"
    before_the_end = (config.steps - 1) // evaluation.every if evaluation.every else 0
    if not evaluation.every:
        yield Problem(place, "auto", "the band is found by evaluations, and evaluation.every is 0", every)
    elif before_the_end < EVALUATIONS_FOR_A_BAND:
        problem = (
            f"the band is found by {EVALUATIONS_FOR_A_BAND} evaluations or more between the first step and the last; "
            f"evaluation.every={evaluation.every} makes {before_the_end} within steps={config.steps}"
        )
        yield Problem(
            place, "auto", problem, f"{every}, or {longer}" if config.steps > EVALUATIONS_FOR_A_BAND else longer
        )
    if config.entropy.band.auto_k not in evaluation.k:
        remedy = f"set it to one of evaluation.k={evaluation.k}, or add it there"
        yield Problem("entropy.band.auto_k", config.entropy.band.auto_k, "no evaluation measures that pass@k", remedy)
    if config.entropy.controller in ("none", "constant"):
        remedy = "use controller=pi, or another schedule"
        yield Problem(place, "auto", f"entropy.controller={config.entropy.controller} steers to no band", remedy)
    if "entrocraft" in config.objective.token_shaping:
        remedy = "give edges and another schedule, or remove it from objective.token_shaping"
        yield Problem(place, "auto", "entrocraft needs a band from the start", remedy)


def _limits(entropy: EntropyConfig) -> Iterator[Problem]:
    actuator = load(ACTUATORS, entropy.actuator).ACTUATOR
    low, high = entropy.command_min, entropy.command_max
    if low == 0 and high == 0:
        return
    if not actuator.signed:  # 0 is no limit that one chooses: it stands for the actuator's own
        low, high = low or actuator.lower, high or actuator.upper
    span = f"[{low:g}, {high:g}]"
    if low >= high:
        remedy = f"set both, e.g. command_min={actuator.lower:g} and command_max={actuator.upper:g}, which are its own"
        yield Problem(
            "entropy.command_min", entropy.command_min, f"{entropy.actuator}'s limits {span} leave no room", remedy
        )
    elif actuator.temperature and not 0 < low <= 1 <= high:
        yield Problem(
            "entropy.command_min",
            low,
            f"the temperature range {span} is not above 0 or does not contain 1, the rest of {entropy.actuator}",
            "choose limits with 0 < command_min <= 1 <= command_max, e.g. 0.8 and 1.2",
        )
    elif not (actuator.temperature or actuator.signed) and low < 0:
        yield Problem(
            "entropy.command_min",
            low,
            f"{entropy.actuator} takes no negative command: it collapses the policy",
            "set entropy.command_min=0",
        )
    elif not actuator.temperature and low > 0:
        yield Problem(
            "entropy.command_min",
            low,
            f"{entropy.actuator} does nothing at a command of 0, which these limits do not contain",
            "set entropy.command_min=0",
        )
    elif actuator.share and high > 1:
        share = f"{entropy.actuator}'s command is a share of tokens"
        yield Problem("entropy.command_max", high, share, "use a number up to 1, e.g. 0.2")


def _controller(entropy: EntropyConfig) -> Iterator[Problem]:
    made_for = load(CONTROLLERS, entropy.controller).MADE_FOR
    if entropy.actuator not in made_for:
        temperature = load(ACTUATORS, made_for[0]).ACTUATOR.temperature
        what = "a temperature" if temperature else f"the coefficient of {made_for[0]}"
        remedy = (
            f"one of the actuators {', '.join(made_for)}" if len(made_for) > 1 else f"entropy.actuator={made_for[0]}"
        )
        yield Problem(
            "entropy.actuator",
            entropy.actuator,
            f"controller {entropy.controller} commands {what}, which this actuator does not take",
            f"use controller=pi, or {remedy}",
        )
    if not entropy.aent.least < entropy.aent.most:
        yield Problem(
            "entropy.aent.least",
            entropy.aent.least,
            f"not below entropy.aent.most ({entropy.aent.most:g})",
            "swap them",
        )
    if (entropy.pi.kp > 0) != (entropy.pi.ki > 0):
        if entropy.pi.ki > 0:
            problem = "has no effect while entropy.pi.kp is 0 (the actuator's measured gains)"
        else:
            problem = "without it the law never learns the drift, and the entropy settles beside its target"
        remedy = "set both gains or neither; the actuators' own have ki = 0.036 kp"
        yield Problem("entropy.pi.ki", entropy.pi.ki, problem, remedy)
    second_rollout = load(ACTUATORS, entropy.actuator).ACTUATOR.second_rollout
    if entropy.pi.split_range and not (second_rollout and entropy.controller == "pi"):
        yield Problem(
            "entropy.pi.split_range",
            True,
            f"only a second rollout has auxiliary prompts to add, not {entropy.controller} with {entropy.actuator}",
            "set controller=pi with actuator=resample, or split_range=false",
        )


def _repeated_prompts(config: RunConfig) -> Iterator[Problem]:
    entropy = config.entropy
    if entropy.band_of == "repeated":
        if not entropy.repeated_prompts:
            remedy = "set entropy.repeated_prompts=32, or band_of=step"
            yield Problem("entropy.band_of", "repeated", "no prompts are repeated", remedy)
        if entropy.controller != "pi":
            problem = f"entropy.controller={entropy.controller} acts on the step's own rows, or on none"
            yield Problem("entropy.band_of", "repeated", problem, "set controller=pi, or band_of=step")
    if (
        entropy.repeated_prompts
        and config.rollout.engine == "sglang"
        and DETERMINISTIC not in config.rollout.sglang.extra_args
    ):
        yield Problem(
            "entropy.repeated_prompts",
            entropy.repeated_prompts,
            "SGLang draws by a sample's own seed only in deterministic inference (on a GPU); without it the reading "
            "repeats nothing",
            f"add {DETERMINISTIC} to rollout.sglang.extra_args, or set entropy.repeated_prompts=0",
        )


def _constant(config: RunConfig) -> Iterator[Problem]:
    entropy = config.entropy
    if entropy.controller != "constant":
        if entropy.command:
            yield Problem(
                "entropy.command",
                entropy.command,
                f"controller {entropy.controller} sets the command itself",
                "remove it, or set entropy.controller=constant",
            )
        return
    if not entropy.command or (entropy.actuator, entropy.command) == ("fc", 1):  # the other positive terms act at T=1
        yield Problem(
            "entropy.command",
            entropy.command,
            f"at rest or impossible: {entropy.actuator} would do nothing",
            f"give a command above {entropy.command:g}, or set entropy.controller=none",
        )
    if load(ACTUATORS, entropy.actuator).ACTUATOR.share and entropy.command > 1:
        share = f"{entropy.actuator}'s command is a share of tokens"
        yield Problem("entropy.command", entropy.command, share, "use at most 1")


def _off_policy(config: RunConfig) -> Iterator[Problem]:
    """An actuator that moves the clip range needs ratios that a loss clips."""
    entropy, loss = config.entropy, config.objective.loss
    if entropy.controller == "none" or not load(ACTUATORS, entropy.actuator).ACTUATOR.off_policy:
        return
    if config.learner.updates_per_step == 1 and config.rollout.staleness == 0:
        yield Problem(
            "entropy.actuator",
            entropy.actuator,
            "with learner.updates_per_step=1 and rollout.staleness=0 every ratio is exactly 1, so nothing is clipped",
            "set learner.updates_per_step to 2 or more, or choose another actuator",
        )
    if loss == "kl_cov":
        yield Problem(
            "entropy.actuator",
            entropy.actuator,
            f"loss {loss} clips no ratio",
            "choose another actuator, or objective.loss=ppo",
        )


def _auxiliary(entropy: EntropyConfig, prompts: int) -> Iterator[Problem]:
    if not load(ACTUATORS, entropy.actuator).ACTUATOR.second_rollout:
        if entropy.auxiliary_replaces:
            yield Problem(
                "entropy.auxiliary_replaces",
                True,
                f"actuator {entropy.actuator} draws no auxiliary rows that could replace others",
                "set it to false, or entropy.actuator=resample",
            )
        return
    if entropy.auxiliary_prompts > prompts:
        yield Problem(
            "entropy.auxiliary_prompts",
            entropy.auxiliary_prompts,
            f"more than the step's prompts (rollout.prompts_per_step = {prompts}), which are the ones drawn again",
            f"use at most {prompts}",
        )
    most = entropy.auxiliary_max_prompts
    if most and not entropy.auxiliary_prompts <= most <= prompts:
        yield Problem(
            "entropy.auxiliary_max_prompts",
            most,
            f"not between auxiliary_prompts ({entropy.auxiliary_prompts}) and rollout.prompts_per_step ({prompts})",
            "use 0 (all prompts) or a number between them",
        )
