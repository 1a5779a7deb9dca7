"""Predicts a step's seconds where engines draw the next steps while the learner trains: a discrete-event simulation.

Engines decode what fits their cache, a token for every running sample in each pass. Groups (a prompt and its samples)
go to the engine with the least work, and may start as long as finished and running ones stay within ``(staleness +
version + 1) x groups per step`` (AReaL's arithmetic, arXiv 2505.24298, section 5.1); nothing is dropped. The learner
trains on the groups that finished first, as soon as there are enough for a step. Then a weight sync holds every engine.
Before it running answers either end, and nothing new begins meanwhile, or (``partial``) they are held, read again with
the new weights, and go on.

The bound is on how many groups start, so it holds on average: a long answer that others overtake may be older. Left
out: what ``engines`` leaves out, verification, and stalls. A sample's final length is reserved in the cache when it
begins, where a real engine guesses.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from launchers.plan.engines import Rollout
from launchers.plan.work import resamples
from pipeline.config.schema import RunConfig

SIGMA = 0.8  # of the logarithm of the responses' lengths: a heavy tail; an assumption
_WARM_UP, _STEPS = 4, 8  # steps that are simulated before, and those that count
_SMALLEST_MEAN = 1.0


Lengths = Callable[[int], np.ndarray]  # tokens of so many responses


@dataclass(frozen=True)
class Plant:
    """What takes time, in seconds."""

    engines: int
    kv_tokens: int  # that an engine's cache holds
    most_running: int  # samples of an engine at a time; 0: as many as the cache holds
    decode: Callable[[float, float], float]  # running samples, mean tokens of each -> seconds of a pass
    prefill: Callable[[float], float]  # tokens of a text -> seconds to read it
    train: float  # of a step
    sync: float
    prompt: int  # tokens
    groups: Sequence[int]  # samples of each group of a step


@dataclass(frozen=True)
class Prediction:
    """The mean over the steps that were simulated."""

    step_seconds: float
    learner_waits: float  # share of the time in which the learner neither trains nor sends weights
    engines_wait: float  # share of the engines' time in which they neither decode nor read prompts


def predict(plant: Plant, lengths: Lengths, staleness: int, *, partial: bool) -> Prediction:
    """Simulate steps with responses of such ``lengths``; the first few are not counted."""
    run = _Run(plant, lengths, staleness, partial)
    run.until(_WARM_UP)
    first, idle, busy = run.now, run.learner_waited, run.busy()
    run.until(_WARM_UP + _STEPS)
    seconds = run.now - first
    return Prediction(
        step_seconds=seconds / _STEPS,
        learner_waits=(run.learner_waited - idle) / seconds,
        engines_wait=1 - (run.busy() - busy) / seconds / plant.engines,
    )


def plant(config: RunConfig, rollouts: Rollout, train: float, sync: float) -> Plant:
    """A run's, from what ``forecast`` predicts of its phases."""
    settings, entropy = config.rollout, config.entropy
    groups = [settings.samples_per_prompt] * settings.prompts_per_step
    if resamples(entropy):
        groups += [entropy.auxiliary_samples] * entropy.auxiliary_prompts
    return Plant(
        engines=settings.engines,
        kv_tokens=rollouts.kv_tokens,
        most_running=0,
        decode=rollouts.speeds.decode,
        prefill=rollouts.speeds.prefill,
        train=train,
        sync=sync,
        prompt=settings.max_prompt_tokens,
        groups=groups,
    )


def heavy_tailed(mean: float, longest: int, seed: int = 0) -> Lengths:
    """Draws log-normal response lengths in tokens, cut off at ``longest``, whose mean is ``mean`` after the cut."""
    draw, normal = np.random.default_rng(seed), NormalDist()

    def mean_of(location: float) -> float:
        """Of the distribution with this mean of the logarithm."""
        at = (math.log(longest) - location) / SIGMA
        whole = math.exp(location + SIGMA**2 / 2)
        return whole * normal.cdf(at - SIGMA) + longest * (1 - normal.cdf(at))

    low, high = -50.0, math.log(longest) + 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(middle) < mean else (low, middle)

    def lengths(count: int) -> np.ndarray:
        drawn = np.exp(low + SIGMA * draw.standard_normal(count))
        return np.clip(drawn, _SMALLEST_MEAN, longest)

    return lengths


@dataclass
class _Group:
    """A prompt and its samples."""

    left: int  # samples that have not ended


@dataclass
class _Engine:
    """One engine. ``clock`` counts the passes that it has made: a sample ends when the clock reaches its number."""

    plant: Plant
    now: float = 0.0
    free: float = 0.0  # when it has read all texts that it was given, and no sync holds it
    ends: float = math.inf  # when its next sample ends
    clock: float = 0.0
    context: float = 0.0  # tokens in the cache, of running samples
    reserved: float = 0.0  # tokens that they will have
    busy: float = 0.0
    waiting: deque[tuple[_Group, float, float]] = field(default_factory=deque)  # group, response, prompt to read
    running: list[tuple[float, int, float, _Group]] = field(default_factory=list)  # end, number, tokens, group
    number: int = 0  # of samples that have begun

    def advance(self, to: float) -> None:
        """Read and decode until the time ``to``, before which no sample ends."""
        if self.running:
            decodes = max(0.0, to - max(self.now, self.free))
            passes = decodes / self._pass_seconds() if decodes else 0.0
            self.clock += passes
            self.context += passes * len(self.running)
            self.busy += to - self.now
        self.now = to

    def end_one(self) -> _Group:
        """Advance to the end of the next sample, and take the sample out."""
        self.advance(self.ends)
        self.clock, _, tokens, group = heapq.heappop(self.running)
        self.context -= tokens
        self.reserved -= tokens
        self._foresee()
        return group

    def begin(self) -> None:
        """Begin waiting samples, in order, while the cache has room."""
        plant = self.plant
        while self.waiting:
            group, response, to_read = self.waiting[0]
            tokens = plant.prompt + response
            full = plant.most_running and len(self.running) >= plant.most_running
            if self.running and (full or self.reserved + tokens > plant.kv_tokens):
                break
            self.waiting.popleft()
            self.free = max(self.free, self.now) + (plant.prefill(to_read) if to_read else 0.0)
            heapq.heappush(self.running, (self.clock + response, self.number, tokens, group))
            self.number += 1
            self.context += plant.prompt
            self.reserved += tokens
        self._foresee()

    def hold(self, seconds: float) -> None:
        """Stand still for a weight sync, then read all running texts again."""
        self.free = max(self.free, self.now) + seconds
        if self.running:
            self.busy -= seconds  # which ``advance`` will count
            self.free += len(self.running) * self.plant.prefill(self.context / len(self.running))
        self._foresee()

    def _foresee(self) -> None:
        self.ends = math.inf
        if self.running:
            self.ends = max(self.now, self.free) + max(0.0, self.running[0][0] - self.clock) * self._pass_seconds()

    def _pass_seconds(self) -> float:
        """Of the pass halfway between now and the next end."""
        count = len(self.running)
        passes = max(0.0, self.running[0][0] - self.clock)
        return self.plant.decode(count, self.context / count + passes / 2)


class _Run:
    """The run as it goes: engines, the learner, and the groups between them."""

    def __init__(self, plant: Plant, lengths: Lengths, staleness: int, partial: bool) -> None:
        self.plant, self.lengths, self.staleness, self.partial = plant, lengths, staleness, partial
        self.engines = [_Engine(plant) for _ in range(plant.engines)]
        self.now = self.learner_waited = 0.0
        self.version = self.started = self.finished = 0  # updates; groups
        self.phase = "waits"  # the learner: waits | trains | drains (for answers to end) | syncs
        self.phase_ends = math.inf
        self._admit()

    def busy(self) -> float:
        """Seconds of work of all engines."""
        for engine in self.engines:
            engine.advance(self.now)
        return sum(engine.busy for engine in self.engines)

    def until(self, version: int) -> None:
        """Go on to the end of the sync that makes ``version``."""
        while self.version < version:
            engine = min(self.engines, key=lambda each: each.ends)
            at = min(engine.ends, self.phase_ends)
            self.learner_waited += at - self.now if self.phase in ("waits", "drains") else 0.0
            self.now = at
            if self.phase_ends <= at:
                self._end_phase()
            else:
                self._end_sample(engine)

    def _admit(self) -> None:
        """Start the groups that admission allows, and the samples for which there is room."""
        step = len(self.plant.groups)
        while self.started < (self.staleness + self.version + 1) * step:
            size = self.plant.groups[self.started % step]
            group = _Group(size)
            engine = min(self.engines, key=lambda each: len(each.waiting) + len(each.running))
            for index, response in enumerate(self.lengths(size).tolist()):
                engine.waiting.append((group, response, 0 if index else self.plant.prompt))
            self.started += 1
        for engine in self.engines:
            engine.advance(self.now)
            engine.begin()

    def _end_sample(self, engine: _Engine) -> None:
        group = engine.end_one()
        group.left -= 1
        if not group.left:
            self.finished += 1
            self._train()
        if self.phase != "drains":
            engine.begin()
        elif not any(each.running for each in self.engines):
            self._sync()

    def _train(self) -> None:
        """Train, if nothing else is under way and there is enough to train on."""
        step = len(self.plant.groups)
        if self.phase == "waits" and self.finished >= step:
            self.finished -= step
            self.phase, self.phase_ends = "trains", self.now + self.plant.train

    def _end_phase(self) -> None:
        if self.phase == "syncs":
            self.version += 1
            self.phase, self.phase_ends = "waits", math.inf
            self._admit()
            self._train()
        elif self.partial or not any(engine.running for engine in self.engines):
            self._sync()
        else:
            self.phase, self.phase_ends = "drains", math.inf

    def _sync(self) -> None:
        self.phase, self.phase_ends = "syncs", self.now + self.plant.sync
        for engine in self.engines:
            engine.advance(self.now)
            engine.hold(self.plant.sync)
