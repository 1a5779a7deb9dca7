"""The asymmetry probe: measures how one update on only correct, or only incorrect, samples changes the entropy.

SCOPE-RL's lever (arXiv 2510.08141) is that correct samples drawn hot raise the entropy and incorrect ones lower it, and
the reverse when drawn cold. The probe measures that on a model as it is: from one and the same state, for every
temperature and sign, one update on the mean log-probability of the rows (+1 correct, -1 incorrect; every token weighs
the same), then the exact entropy of fresh responses at T=1. All measurements of one repeat share prompts and seeds, so
they differ by the update alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import torch

from pipeline.config.schema import RunConfig
from pipeline.learner import Learner
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.weight_sync import WeightSync
from pipeline.seeds import sample_seeds
from pipeline.step.batch import build_batch, usable
from pipeline.types import ControlDecision, GenerateRequest, Prompt, Role, SampleGroup, TrainBatch

SIGNS = {"positives": 1.0, "negatives": -1.0}
MEASURING_PROMPTS = 96  # whose responses measure the entropy
MEASURING_SAMPLES = 32
_EPSILON = 1e3
_REST = ControlDecision(1.0, 1.0, 0, "off", "")


@dataclass(frozen=True)
class Effect:
    """Change of the entropy by one update, nats per token."""

    temperature: float
    sign: str  # of ``SIGNS``
    change: float  # mean over repeats
    error: float  # its standard error; NaN with one repeat
    rows: float  # mean number of rows of the update
    repeats: int  # that had any


@dataclass(frozen=True)
class Asymmetry:
    """What the probe found."""

    entropy: float  # before any update, nats per token
    correct: float  # share of correct responses at T=1, or at the temperature nearest to it
    effects: list[Effect]

    def slope(self, sign: str) -> float:
        """Least-squares slope of the change over ln T, of the temperatures that had rows; NaN of fewer than two.

        The theory has it above 0 for positives, below for negatives.
        """
        points = [(math.log(e.temperature), e.change) for e in self.effects if e.sign == sign and e.repeats]
        if len(points) < 2:
            return math.nan
        middle, level = (fmean(values) for values in zip(*points, strict=True))
        spread = sum((x - middle) ** 2 for x, _ in points)
        return sum((x - middle) * (y - level) for x, y in points) / spread if spread else math.nan


def probe_config(config: RunConfig, step_size: float) -> RunConfig:
    """What the probe runs under: one plain gradient step of ``step_size`` without actuator, KL or clipping.

    Adam's momentum would add what came before, and its division by the gradients' sizes would blur first-order effects;
    with an epsilon far above those sizes it is gradient descent at the rate lr / epsilon.
    """
    optimizer = replace(
        config.learner.optimizer,
        lr=step_size * _EPSILON,
        min_lr=0.0,
        lr_schedule="constant",
        warmup_steps=0,
        betas=[0.0, config.learner.optimizer.betas[1]],
        eps=_EPSILON,
        weight_decay=0.0,
        clip_grad=0.0,
    )
    objective = replace(config.objective, kl_coef=0.0, correction=replace(config.objective.correction, kind="none"))
    return replace(
        config,
        learner=replace(config.learner, updates_per_step=1, optimizer=optimizer),
        objective=objective,
        entropy=replace(config.entropy, controller="none"),
        rollout=replace(config.rollout, weight_dtype="auto"),
    )


class Probe:
    """Learner, engine and verifier in one state, to which every measurement returns.

    Args:
        learner: loaded; its state is saved to ``state_dir`` (an empty folder that all its ranks see) now.
        generate: answers requests as a step of the run does: with episodes where it has an environment.
        sync: moves the weights from the learner to the engines behind ``generate``.
        prompts: to draw from, at least ``MEASURING_PROMPTS`` are used if there are so many.
        config: as ``probe_config`` made it.
    """

    def __init__(
        self,
        learner: Learner,
        generate: Callable[[Sequence[GenerateRequest]], Sequence[SampleGroup]],
        sync: WeightSync,
        verifier: VerifierStage,
        prompts: Sequence[Prompt],
        config: RunConfig,
        state_dir: Path,
    ) -> None:
        self._learner, self._generated, self._sync, self._verifier = learner, generate, sync, verifier
        self._prompts, self._config = prompts, config
        self._state = state_dir
        self._version = 0
        self._files = learner.save(state_dir)()

    def run(
        self,
        temperatures: Sequence[float],
        repeats: int,
        prompts_per_update: int,
        said: Callable[[str], None] = lambda line: None,
    ) -> Asymmetry:
        """Measure every temperature and sign ``repeats`` times; ``said`` hears of each repeat done."""
        changes: dict[tuple[float, str], list[float]] = {(t, s): [] for t in temperatures for s in SIGNS}
        rows: dict[tuple[float, str], list[int]] = {key: [] for key in changes}
        before, correct = [], []
        nearest = min(temperatures, key=lambda t: abs(math.log(t)))
        for repeat in range(repeats):
            self._restore()
            drawn = {t: self._draw(t, repeat, prompts_per_update) for t in temperatures}
            samples = [sample for group in drawn[nearest] for sample in group.samples]
            correct.append(fmean(sample.correct for sample in samples))
            before.append(self._entropy(repeat))
            for (temperature, sign), found in changes.items():
                batch = self._batch(drawn[temperature], sign)
                if batch is None:
                    continue
                self._restore()
                self._learner.update(batch, repeat)
                found.append(self._entropy(repeat) - before[-1])
                rows[temperature, sign].append(batch.rows)
            said(f"repeat {repeat + 1} of {repeats}")
        effects = [_effect(*key, found, rows[key]) for key, found in changes.items()]
        return Asymmetry(fmean(before), fmean(correct), effects)

    def _restore(self) -> None:
        self._learner.restore(self._state, self._files)
        self._push()

    def _push(self) -> None:
        self._version += 1
        self._sync.push(self._version)

    def _chosen(self, repeat: int, role: Role, count: int) -> list[Prompt]:
        rng = random.Random(f"{self._config.seed} {repeat} {role}")
        return rng.sample(list(self._prompts), min(count, len(self._prompts)))

    def _generate(
        self, prompts: Sequence[Prompt], samples: int, temperature: float, repeat: int, role: Role
    ) -> Sequence[SampleGroup]:
        limit, seed = self._config.rollout.max_new_tokens, self._config.seed
        seeds = (sample_seeds(seed, repeat, prompt.id, samples, role) for prompt in prompts)
        return self._generated(
            [GenerateRequest(prompt, own, temperature, limit, role) for prompt, own in zip(prompts, seeds, strict=True)]
        )

    def _draw(self, temperature: float, repeat: int, count: int) -> list[SampleGroup]:
        prompts = self._chosen(repeat, Role.AUXILIARY, count)
        samples = self._config.rollout.samples_per_prompt
        return self._verifier.verify(self._generate(prompts, samples, temperature, repeat, Role.AUXILIARY))

    def _entropy(self, repeat: int) -> float:
        """Exact entropy at T=1 of what the learner's weights now say, over fresh responses.

        Moves the weights: restore after it.
        """
        self._push()
        prompts = self._chosen(repeat, Role.EVALUATION, MEASURING_PROMPTS)
        groups = self._generate(prompts, MEASURING_SAMPLES, 1.0, repeat, Role.EVALUATION)
        # A learner reports entropy only of what it is given to learn from; that update is undone.
        batch = build_batch([replace(g, role=Role.MAIN) for g in groups], [], _REST, self._config)
        return self._learner.update(batch, repeat).entropy.mean

    def _batch(self, groups: Sequence[SampleGroup], sign: str) -> TrainBatch | None:
        """The rows of one sign as an on-policy update; None if there are none."""
        wanted = SIGNS[sign] > 0
        kept = [
            SampleGroup(
                group.prompt,
                # No term of this loss knows the temperature; ``build_batch`` takes main rows at 1 only.
                tuple(replace(s, temperature=1.0) for s in group.samples if s.correct == wanted and usable(s)),
                Role.MAIN,
            )
            for group in groups
        ]
        if not any(group.samples for group in kept):
            return None
        batch = build_batch(kept, [], _REST, self._config)
        tokens = len(batch.behavior_log_probs)
        return replace(
            batch,
            advantages=torch.full_like(batch.advantages, SIGNS[sign]),
            weights=torch.full_like(batch.weights, 1 / tokens),
        )


def _effect(temperature: float, sign: str, changes: list[float], rows: list[int]) -> Effect:
    n = len(changes)
    mean = fmean(changes) if n else math.nan
    error = stdev(changes) / math.sqrt(n) if n > 1 else math.nan
    return Effect(temperature, sign, mean, error, fmean(rows) if n else 0.0, n)
