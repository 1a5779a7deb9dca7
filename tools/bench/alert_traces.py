"""Makes event logs of invented runs: healthy ones, and ones with a fault whose beginning is known.

The entropy is that of the quickstart's controller on the plant measured with the 100k-parameter model
(docs/methods.md): ln H integrates a drift of -.003 a step and .0114 per ln T. What is laid over it, white noise of ln H
and of the reward, is measured on recorded runs by ``noise_of``. A step takes 30 s, as on a cluster, so that clocks have
something to tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.entropy.band import build_band
from pipeline.entropy.factory import build_controller
from pipeline.monitoring.events import read_events
from pipeline.types import EntropyReading
from pipeline.units import GIB

STEPS, ONSET = 600, 310
STEP_SECONDS, EVALUATION_SECONDS, CHECKPOINT_SECONDS = 30.0, 150.0, 40.0
EVALUATE_EVERY, SAVE_EVERY = 50, 50
ROWS = 256
DRIFT, GAIN = -0.003, 0.0114
NOISE, REWARD_NOISE, WANDER = 0.07, 0.075, 0.003
Event = dict[str, Any]


@dataclass(frozen=True)
class World:
    """What the run is up against at one step."""

    drift: float = DRIFT  # of ln H a step
    gain: float = GAIN  # of ln H a step, per ln T
    pull: float = 0.0  # share of the way back to ``home`` that ln H goes each step
    home: float = 0.0
    swing: float = 0.0  # amplitude of a swing of ln H with a period of 24 steps, added to what is measured
    reward: float = 1.0  # factor
    equal: float | None = None  # share of groups with equal rewards
    solvable: bool = True
    positives: int | None = None  # correct rows that the actuator gets, where they are not all that are right
    unjudged: float = 0.0  # share of the samples
    busiest: float = 1.2  # expert, times the mean of its layer
    finite: bool = True
    mismatch: float = 1.0  # factor
    engines: int = 8
    saves: bool = True
    pause: float = 0.0  # seconds that this step takes longer
    watchdog: bool = False  # whether it speaks in that pause
    disk_per_hour: float = 0.0  # GiB that others fill


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong at ``ONSET``.

    ``world`` maps the world and the steps since then to the world as it now is. ``expected``: rules of which one must
    be raised; ``allowed``: further ones that are right to speak.
    """

    name: str
    world: Callable[[World, int], World]
    expected: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    before: World = World()


UNCONTROLLED = ("entropy.controller=none",)
REST = World(drift=0.0, pull=0.03, home=math.log(0.3))  # a policy that stays in the band by itself
LOST = ("out_of_band", "entropy_collapse", "saturated", "not_reachable", "wrong_sign")
FAULTS = (
    Fault(
        "collapse without control, as GRPO's",
        lambda w, k: World(),
        ("entropy_collapse",),
        ("out_of_band",),
        UNCONTROLLED,
        REST,
    ),
    Fault(
        "collapse under control: the actuator fails", lambda w, k: replace(w, drift=-0.008, gain=0.0), LOST[1:], LOST
    ),
    Fault("collapse at once: -5 % a step", lambda w, k: replace(w, drift=-0.05), ("entropy_collapse",), LOST),
    Fault(
        "slow drift out of the band",
        lambda w, k: World(drift=0.002),
        ("out_of_band",),
        ("entropy_explosion",),
        UNCONTROLLED,
        REST,
    ),
    Fault(
        "saturated in the band",
        lambda w, k: replace(w, drift=0.0, pull=0.04, home=math.log(0.277) - GAIN * math.log(6) / 0.04),
        ("saturated",),
        LOST,
    ),
    Fault(
        "band out of reach",
        lambda w, k: replace(w, drift=0.0, pull=0.04, home=math.log(0.12)),
        ("not_reachable",),
        LOST,
    ),
    Fault(
        "the actuator acts with the wrong sign",
        lambda w, k: replace(w, gain=-GAIN),
        ("wrong_sign", "entropy_collapse"),
        LOST,
    ),
    Fault("explosion", lambda w, k: replace(w, drift=0.08), ("exploding", "entropy_explosion"), LOST),
    Fault(
        "explosion without control",
        lambda w, k: World(drift=0.08),
        ("entropy_explosion",),
        LOST,
        UNCONTROLLED,
        REST,
    ),
    Fault(
        "explosion before the band is reached",
        lambda w, k: replace(w, drift=0.08),
        ("entropy_runaway",),
        LOST,
        (*UNCONTROLLED, "entropy.band.low=0.09", "entropy.band.high=0.11"),
        replace(REST, home=math.log(0.55)),
    ),
    Fault("oscillation", lambda w, k: replace(w, swing=0.4), ("oscillation",), LOST),
    Fault("reward drop by a third", lambda w, k: replace(w, reward=max(0.67, 1 - 0.03 * k)), ("reward_drop",)),
    Fault("NaN in loss and gradient, once", lambda w, k: replace(w, finite=k > 0), ("not_finite",)),
    Fault(
        "no positives",
        lambda w, k: replace(w, solvable=False),
        ("no_positives",),
        ("no_signal", "reward_drop", *LOST),
    ),
    Fault("few positives", lambda w, k: replace(w, positives=3), ("few_positives",), LOST),
    Fault("a tenth of the samples cannot be judged", lambda w, k: replace(w, unjudged=0.1), ("unjudged",)),
    Fault(
        "a router that collapses in 100 steps",
        lambda w, k: replace(w, busiest=1.2 * 4 ** min(1.0, k / 100)),
        ("experts_unbalanced",),
    ),
    Fault("groups without advantage", lambda w, k: replace(w, equal=0.98), ("no_signal",)),
    Fault(
        "mismatch grows tenfold in 100 steps",
        lambda w, k: replace(w, mismatch=10 ** min(1.0, k / 100)),
        ("mismatch_growing",),
    ),
    Fault("a step takes 20 times as long", lambda w, k: replace(w, pause=600.0 * (k == 0)), ("slow_step",)),
    Fault(
        "stall, seen by the watchdog",
        lambda w, k: replace(w, pause=900.0 * (k == 0), watchdog=k == 0),
        ("stall",),
        ("slow_step",),
    ),
    Fault(
        "an engine is lost for two steps", lambda w, k: replace(w, engines=7 if k < 2 else 8), ("engine_lost", "fault")
    ),
    Fault("others fill the disk", lambda w, k: replace(w, disk_per_hour=400.0), ("disk_filling",)),
    Fault("checkpoints stop", lambda w, k: replace(w, saves=False), ("checkpoint_overdue",)),
    Fault(
        "nothing is ever saved",
        lambda w, k: w,
        ("unsaved_work",),
        (),
        ("checkpoint.every=0",),
        World(saves=False),
    ),
)
HEALTHY = {
    "the quickstart": (),
    "a wide way into the band": ("entropy.band.low=0.18", "entropy.band.high=0.22"),
    "a band that moves": (
        "entropy.band.schedule=linear",
        "entropy.band.low=0.36",
        "entropy.band.high=0.44",
        "entropy.band.end_low=0.22",
        "entropy.band.end_high=0.27",
    ),
}


def config_of(*overrides: str) -> RunConfig:
    """The quickstart's configuration, as long as a trace."""
    return load_config(Path("quickstart.yaml"), [f"steps={STEPS}", f"checkpoint.every={SAVE_EVERY}", *overrides])


def trace(seed: int, overrides: Sequence[str] = (), fault: Fault | None = None) -> Iterator[Event | tuple[float, int]]:
    """Events of one run in order, and between them (Unix seconds, bytes free on the disk) twice a minute."""
    config = config_of(*overrides, *(fault.overrides if fault else ()))
    rng = np.random.default_rng(seed)
    band = build_band(config.entropy.band, STEPS)
    controller = build_controller(config.entropy, band, 16)
    decision, y, clock, free = controller.initial(), math.log(0.55), 1.7e9, 3000.0
    yield {"kind": "run_start", "time": clock, "step": 0}
    clock += EVALUATION_SECONDS  # a run begins with one
    yield {"kind": "evaluation", "time": clock, "step": 0, "pass_at_k": {}, "maj_at_k": {}}
    ended = clock
    for step in range(STEPS):
        since = step - ONSET
        world = fault.before if fault else World()
        world = fault.world(world, since) if fault and since >= 0 else world
        seconds = STEP_SECONDS * rng.lognormal(0, 0.15) * (3 if rng.random() < 0.01 else 1)
        began = clock
        clock += seconds + world.pause
        free -= world.disk_per_hour * (clock - ended) / 3600
        ended = clock
        if world.watchdog:
            yield from _ticks(began, clock - 30, free)
            yield {
                "kind": "stall",
                "time": clock - 30,
                "step": step,
                "seconds": world.pause,
                "factor": 20,
                "action": "report",
            }
            began = clock - 30
        yield from _ticks(began, clock, free)
        reward, positives = _rewards(rng, step, world)
        swing = world.swing * math.sin(2 * math.pi * since / 24)
        entropy = math.exp(y + swing + NOISE * rng.standard_normal())
        before, decision = decision, controller.update(EntropyReading(entropy * 2000, 2000, step), positives)
        push = math.log(before.temperature) * min(1.0, 2 * reward) * world.gain
        y += world.drift + push + world.pull * (world.home - y) + WANDER * rng.standard_normal()
        if world.engines < 8:
            yield {"kind": "fault", "time": clock, "description": "engine 3 was started again: it did not answer"}
        yield _step(rng, step, clock, entropy, band.at(step), before, decision, reward, positives, seconds, world)
        done = step + 1
        if done % EVALUATE_EVERY == 0:
            yield from _ticks(clock, clock + EVALUATION_SECONDS, free)
            clock += EVALUATION_SECONDS
            yield {
                "kind": "evaluation",
                "time": clock,
                "step": done,
                "pass_at_k": {"1": {"value": reward, "low": reward, "high": reward}},
                "maj_at_k": {},
            }
        if done % SAVE_EVERY == 0 and world.saves:
            clock += CHECKPOINT_SECONDS
            free -= 60 if done <= 2 * SAVE_EVERY else rng.normal(0, 1)  # two are kept
            yield {"kind": "checkpoint", "time": clock, "step": done, "path": f"checkpoints/step-{done:08d}"}


def noise_of(run_dir: Path) -> tuple[float, float]:
    """Standard deviation of the white noise of ln H and of the reward of a recorded run.

    Computed from differences of neighbouring steps.
    """
    steps = [event for event in read_events(run_dir / "events.jsonl") if event["kind"] == "step"]
    entropy = np.diff(np.log([event["entropy"] for event in steps]))
    reward = np.diff([event["reward"] for event in steps])
    return float(entropy.std() / math.sqrt(2)), float(reward.std() / math.sqrt(2))


def _ticks(begin: float, end: float, free: float) -> Iterator[tuple[float, int]]:
    for index in range(1, int((end - begin) / STEP_SECONDS) + 1):
        yield begin + index * STEP_SECONDS, int(free * GIB)


def _rewards(rng: np.random.Generator, step: int, world: World) -> tuple[float, int]:
    """Mean reward, as it grows in the quickstart, and correct rows."""
    if not world.solvable:
        return 0.0, 0
    learnt = 0.33 + 0.23 * (1 - math.exp(-step / 90))
    reward = min(1.0, max(0.0, world.reward * learnt + REWARD_NOISE * rng.standard_normal()))
    return reward, round(reward * ROWS) if world.positives is None else world.positives


def _step(
    rng: np.random.Generator,
    step: int,
    clock: float,
    entropy: float,
    edges: tuple[float, float],
    before: Any,
    decision: Any,
    reward: float,
    positives: int,
    seconds: float,
    world: World,
) -> Event:
    equal = 0.3 + 0.08 * rng.standard_normal() if world.solvable else 1.0
    return {
        "kind": "step",
        "time": clock,
        "step": step,
        "entropy": entropy,
        "entropy_filtered": decision.filtered_entropy,
        "band_low": edges[0],
        "band_high": edges[1],
        "target": decision.target,
        "temperature": before.temperature,
        "command": before.command,
        "state": decision.state,
        "reason": decision.reason,
        "reward": reward,
        "positives": positives,
        "all_equal_groups": min(1.0, max(0.0, equal if world.equal is None else world.equal)),
        "loss": float(rng.normal(-0.9, 0.05)) if world.finite else math.nan,
        "grad_norm": float(rng.lognormal(0.8, 0.35)) if world.finite else math.nan,
        "metrics": {
            "mismatch_kl": 4e-4 * world.mismatch * rng.lognormal(0, 0.3),
            "router_load_max": world.busiest * rng.lognormal(0, 0.1),
            "positive_term": 0.6,
        },
        "unjudged": world.unjudged,
        "seconds": {"total": seconds + world.pause},
        "engines": {"alive": world.engines, "total": 8},
    }
