"""The law card of a run: what was steered, how strongly it answers, how well it was held, what that cost, what failed.

Read from the run's folder alone: its configuration and its events. A row is a question and its answer in words and
figures, for a page that somebody else shall be able to check.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config.load import config_hash
from pipeline.entropy.actuator import Actuator, acting, actuator_of
from pipeline.entropy.identify import IdentificationError, Identified, Record, identify
from pipeline.entropy.law import Loop
from pipeline.monitoring.differences import config_differences
from pipeline.monitoring.naming import counted
from pipeline.monitoring.plant_data import readings_of, record_of
from pipeline.monitoring.price import ROLES, reward_cost
from pipeline.monitoring.series import LAST_STEPS
from pipeline.monitoring.summary import RunHistory, is_baseline_of, pass_at
from pipeline.monitoring.tracking import STAY, Tracking, of_series
from pipeline.registry import load

RECENT = 2000  # steps that the plant is identified from, the newest: the fit's time grows with them
PLANT = "ln H(k+1) = ln H(k) + b u(k-s) + d + noise at step k"
HOTTER = 1.1  # the rise of a temperature that the gain is also told for
GOALS: Mapping[str, Callable[[Tracking], bool]] = {  # of a run that came to its band; docs/lab.md
    "95 % of the steps in band": lambda tracking: tracking.time_in_band >= 0.95,
    "an RMS error of 5 %": lambda tracking: tracking.rms_error <= 0.05,
    "an overshoot of 10 %": lambda tracking: tracking.overshoot <= 0.1,
    f"{STAY} steps in the band in a row": lambda tracking: tracking.settling_step is not None,
}
NO_PRICE = (
    "entropy.",
    "steps",
    "evaluation.every",
    "checkpoint.",
    "monitoring.",
    "runtime",
)  # no learning rests on them
Rows = dict[str, str]


@dataclass(frozen=True)
class _Steered:
    """A run under control, and what its rows are made of."""

    run: RunHistory
    actuator: Actuator
    limits: tuple[float, float] | None  # of the command; None: a command that no reading changes
    tracking: Tracking
    plant: Identified | None
    why_not: str  # no plant could be identified


def law_card(run: RunHistory, others: Sequence[RunHistory] = ()) -> Rows:
    """The rows of one run; empty for a run without control.

    ``others``: runs of the same report. The first without control, of the same seed, is what the price is taken
    against.
    """
    config = run.config.entropy
    if run.is_baseline or acting(config) is None or run.steps == 0:
        return {}
    actuator = actuator_of(config)
    built = load("pipeline.entropy.controllers", config.controller).build(config, actuator)
    plant, why_not = _plant(run)
    limits = built.limits if isinstance(built, Loop) else None
    steered = _Steered(run, actuator, limits, of_series(run.series), plant, why_not)
    same_seed = (other for other in others if other.config.seed == run.config.seed)
    baseline = next((other for other in same_seed if is_baseline_of(other, run)), None)
    return {
        "Run": _run(run),
        "Band": _band(run),
        "Plant": _plant_in_words(steered),
        "Gain b": _gain(steered),
        "Drift d": _drift(plant),
        "Noise": _noise(plant),
        "Command that holds the entropy": _rest(steered),
        "What the controller did": _did(steered),
        "Tracking": _tracked(steered),
        "Price": _price(run, baseline),
        "Not reached": "; ".join(_not_reached(steered)) or f"nothing (goals: {', '.join(GOALS)})",
    }


def _run(run: RunHistory) -> str:
    config = run.config
    learner, rollout = config.learner, config.rollout
    return (
        f"{config.name}, seed {config.seed}: {counted(run.steps, 'step')} of {config.steps}, {run.status}; model "
        f"{Path(config.model.hf_path).name}, {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} answers "
        f"and {counted(learner.updates_per_step, 'update')} a step, advantage {config.objective.advantage}; one run, "
        f"so no interval here is over seeds; configuration {config_hash(config)[:12]}"
    )


def _plant(run: RunHistory) -> tuple[Identified | None, str]:
    try:
        record = record_of(run)
        return identify([Record(record.entropy[-RECENT:], record.command[-RECENT:])]), ""
    except IdentificationError as error:
        return None, str(error)


def _band(run: RunHistory) -> str:
    low, high = run.column("entropy/band_low"), run.column("entropy/band_high")
    known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    if not len(known):
        return "-"
    first, last = known[0], known[-1]
    rows = "repeated prompts, the same at every step" if run.config.entropy.band_of == "repeated" else "step's own rows"
    text = (
        f"{low[first]:.3g} to {high[first]:.3g} nats per token, entropy at T=1 over the tokens the policy drew for the "
        f"{rows}"
    )
    if (low[first], high[first]) != (low[last], high[last]):
        text += f"; {low[last]:.3g} to {high[last]:.3g} at the end"
    return f"{text} (schedule {run.config.entropy.band.schedule}); the target is its geometric middle"


def _plant_in_words(steered: _Steered) -> str:
    unit = "ln T+" if steered.actuator.temperature else "the command"
    model = (
        f"{PLANT}; H is the entropy in nats, u = {unit} of {steered.actuator.name}, 0 where it had nothing to act on"
    )
    if steered.plant is None:
        return f"{model}; not identified: {steered.why_not}"
    plant = steered.plant
    low, high = plant.delay_interval
    delay = f"delay s = {plant.delay} [{low}, {high}] steps, the optimizer's momentum included"
    fit = f"fitted by least squares on a Kalman filter's innovations, to {readings_of(steered.run)}"
    return f"{model}; one plant for {plant.steps:,} steps, {fit}, intervals 95 %; {delay}"


def _gain(steered: _Steered) -> str:
    learnt = steered.run.column("control/gain")
    learnt = learnt[np.isfinite(learnt)]
    own = f"; the controller took it for {learnt[0]:.3g} at first and {learnt[-1]:.3g} at last" if len(learnt) else ""
    if steered.plant is None:
        return "-" + own
    low, high = steered.plant.gain_interval
    sign = "" if low > 0 or high < 0 else ", so its sign is not known"
    text = f"{steered.plant.gain:+.3g} {_interval((low, high))} of ln H per unit of u and step{sign}"
    if steered.actuator.temperature:
        text += f" (T+ higher by a tenth: {steered.plant.gain * math.log(HOTTER):+.2%} of H per step)"
    return text + own


def _drift(plant: Identified | None) -> str:
    if plant is None:
        return "-"
    low, high = plant.drift_interval
    text = f"{plant.drift:+.3g} {_interval((low, high))} of ln H per step"
    if low <= 0 <= high:
        return f"{text}, so its sign is not known"
    way = "halves" if plant.drift < 0 else "doubles"
    return f"{text}: at u = 0 H {way} in {math.log(2) / abs(plant.drift):,.0f} steps"


def _noise(plant: Identified | None) -> str:
    if plant is None:
        return "-"
    return (
        f"standard deviations of ln H: a single reading {plant.sensor_noise:.1%} around the policy's entropy, the "
        f"policy {plant.process_noise:.1%} per step"
    )


def _rest(steered: _Steered) -> str:
    plant = steered.plant
    if plant is None or math.isnan(plant.rest):
        return "not known"
    command = steered.actuator.to_command(plant.rest)
    text = f"{command:.3g} (u = -d / b)"
    if steered.limits is None:
        return text
    low, high = steered.limits
    return f"{text}, {'within' if low <= command <= high else 'OUTSIDE'} the limits {low:g} to {high:g}"


def _did(steered: _Steered) -> str:
    run, config = steered.run, steered.run.config.entropy
    commands = run.column("control/command")
    commands = commands[np.isfinite(commands)]
    states = Counter({state: int(run.series.in_state(state).sum()) for state in run.series.states()})
    shares = ", ".join(
        f"{state} {count / max(1, states.total()):.0%}" for state, count in states.most_common() if count
    )
    text = f"{config.controller} on {steered.actuator.name}: {shares} of the steps"
    if not len(commands):
        return text
    u = np.array([steered.actuator.to_u(command) for command in commands])
    moved = f", moved by {np.abs(np.diff(u)).mean():.2g} of u a step on average" if len(u) > 1 else ""
    name = "T+" if steered.actuator.temperature else "command"
    text += f"; {name} {commands.min():.3g} to {commands.max():.3g}, median {np.median(commands):.3g}{moved}"
    if steered.limits is None:
        return text
    low, high = (np.isclose(commands, limit, rtol=1e-9, atol=0).mean() for limit in steered.limits)
    return f"{text}; at its lower limit in {low:.0%} of the steps, at its upper in {high:.0%}"


def _tracked(steered: _Steered) -> str:
    tracking, readings = steered.tracking, steered.run.column("entropy/controlled")
    readings = readings[np.isfinite(readings)]
    start = f"of H filtered with weight 0.8 on the past, errors in units of the target; {_ends(readings)}"
    if tracking.entry_step is None:
        return f"{start}; the band was never entered"
    settled = "never settled" if tracking.settling_step is None else f"settled at {tracking.settling_step}"
    return (
        f"{start}; entered at step {tracking.entry_step}, {settled} (20 steps in a row); from entry on in band "
        f"{tracking.time_in_band:.1%}, RMS error {tracking.rms_error:.1%} (single readings "
        f"{tracking.rms_error_raw:.1%}), bias {tracking.bias:+.1%}, overshoot {tracking.overshoot:.1%}, "
        f"{tracking.oscillation:.1f} crossings of the target per 100 steps"
    )


def _ends(readings: np.ndarray) -> str:
    if not len(readings):
        return "no reading"
    return f"first reading {readings[0]:.3g} nats, mean of the last {LAST_STEPS} {readings[-LAST_STEPS:].mean():.3g}"


def _price(run: RunHistory, baseline: RunHistory | None) -> str:
    tokens = {role: float(np.nansum(run.column(f"tokens/{role}"))) for role in ROLES}
    extra = (tokens["auxiliary"] + tokens["repeated"]) / tokens["main"] if tokens["main"] else 0.0
    more = f"{extra:.1%} more response tokens a step for its readings and second rollout"
    if baseline is None:
        beside = f"no run of the same task, without control and with seed {run.config.seed}, stands beside it"
        return f"reward not known: {beside}; {more}"
    cost = reward_cost(run, baseline)
    text = (
        f"{abs(cost):.1%} {'less' if cost >= 0 else 'more'} training reward than {baseline.title} over as many tokens"
    )
    text += f" (no interval: one run each){_other_differences(run, baseline)}; {more}"
    if not (run.evaluations and baseline.evaluations):
        return text
    last, other = run.evaluations[-1], baseline.evaluations[-1]
    for k in (1, 16):
        (value, *interval), (theirs, *their_interval) = pass_at(last, k), pass_at(other, k)
        if math.isfinite(value) and math.isfinite(theirs):
            text += f"; pass@{k} {value:.3f} {_interval(interval)} against {theirs:.3f} {_interval(their_interval)}"
    return f"{text} (held-out prompts, 95 % intervals; evaluated after {last['step']:,} and {other['step']:,} steps)"


def _other_differences(run: RunHistory, baseline: RunHistory) -> str:
    """What a price is of beside entropy control: keys of the two runs that differ and bear on what is learnt."""
    keys = [key for key in config_differences([run.config, baseline.config]) if not key.startswith(NO_PRICE)]
    return f", which differs also in {', '.join(keys)}" if keys else ""


def _not_reached(steered: _Steered) -> list[str]:
    run, tracking = steered.run, steered.tracking
    found = [] if run.status == "completed" else [f"the end: {run.status} after {counted(run.steps, 'step')}"]
    missed = [goal for goal, met in GOALS.items() if not met(tracking)]
    found += ["the band"] if tracking.entry_step is None else missed
    saturated = np.flatnonzero(run.series.in_state("saturated"))
    if len(saturated):
        event = run.series.event(int(saturated[-1])) or {"reason": ""}
        found.append(f"{counted(len(saturated), 'step')} at the limit, the last at {saturated[-1]}: {event['reason']}")
    return found


def _interval(edges: Sequence[float]) -> str:
    return f"[{edges[0]:.3g}, {edges[1]:.3g}]"
