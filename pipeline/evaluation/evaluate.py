"""Draws samples for held-out prompts and measures them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.config.schema import RunConfig
from pipeline.evaluation.metrics import distinct_correct, maj_at_k, pass_at_k, pass_interval
from pipeline.rewards.answers import grouped_answers
from pipeline.rewards.stage import VerifierStage, stop_if_none_was_judged
from pipeline.seeds import sample_seeds, stream_seed
from pipeline.types import GenerateRequest, Prompt, Role, SampleGroup


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval (``metrics.pass_interval``)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation found. Samples that could not be judged count as wrong and are counted apart."""

    pass_at_k: dict[int, Estimate]
    avg: float  # share of correct samples (avg@n)
    maj_at_k: dict[int, float]
    distinct_correct: float  # different correct answers per question, among all its samples
    mean_reward: float
    mean_length: float  # response tokens, end-of-sequence included
    questions: int
    samples: int  # per question
    verifier_errors: int  # samples without a verdict
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the k become strings."""
        plain = asdict(self)
        for name in ("pass_at_k", "maj_at_k"):
            plain[name] = {str(k): value for k, value in plain[name].items()}
        return plain


def evaluate(
    generate: Callable[[Sequence[GenerateRequest]], Sequence[SampleGroup]],
    verifier: VerifierStage,
    prompts: Sequence[Prompt],
    config: RunConfig,
    step: int,
) -> EvaluationResult:
    """Measure the policy that ``generate`` draws from, after ``step`` updates.

    Uses at most ``evaluation.prompts`` of ``prompts``.

    The chosen prompts depend on their ids alone, so that runs with different seeds answer the same questions. Raises
    ``ValueError`` when there are no prompts or a k exceeds ``evaluation.samples``, ``VerifierFailedError`` when not one
    response could be judged.
    """
    started = time.perf_counter()
    groups = generate(evaluation_requests(prompts, config, step))
    return judged(groups, verifier, config, started)


def evaluation_requests(prompts: Sequence[Prompt], config: RunConfig, step: int) -> list[GenerateRequest]:
    """What is asked after ``step`` updates. Raises ``ValueError`` when there are no prompts."""
    if not prompts:
        raise ValueError("there are no held-out prompts to evaluate: raise data.held_out, or switch evaluation off")
    settings = config.evaluation

    def request(prompt: Prompt) -> GenerateRequest:
        seeds = sample_seeds(config.seed, step, prompt.id, settings.samples, Role.EVALUATION)
        return GenerateRequest(prompt, seeds, settings.temperature, config.rollout.max_new_tokens, Role.EVALUATION)

    return [request(prompt) for prompt in choose_prompts(prompts, settings.prompts)]


def judged(
    drawn: Sequence[SampleGroup], verifier: VerifierStage, config: RunConfig, started: float
) -> EvaluationResult:
    """What samples of ``evaluation_requests`` say, asked at ``started`` (``time.perf_counter``).

    Raises ``VerifierFailedError`` when not one response could be judged.
    """
    groups = verifier.verify(drawn)
    stop_if_none_was_judged(groups, config.data)
    seed = stream_seed(config.seed, "bootstrap")
    return measure(groups, config.evaluation.k, seconds=time.perf_counter() - started, seed=seed)


def choose_prompts(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """The ``limit`` prompts whose ids have the smallest hashes, in the order given."""
    chosen = sorted(prompts, key=lambda prompt: hashlib.blake2b(prompt.id.encode(), digest_size=8).digest())[:limit]
    ids = {prompt.id for prompt in chosen}
    return [prompt for prompt in prompts if prompt.id in ids]


def measure(groups: Sequence[SampleGroup], ks: Sequence[int], *, seconds: float, seed: int) -> EvaluationResult:
    """The figures of verified groups, all with the same number of samples. ``seed`` is the bootstrap's."""
    samples = [sample for group in groups for sample in group.samples]
    n = len(groups[0].samples)
    correct = np.array([[sample.correct for sample in group.samples] for group in groups])
    answers = [
        grouped_answers(group.prompt.verifier, [s.text for s in group.samples], [s.correct for s in group.samples])
        for group in groups
    ]
    counts = correct.sum(axis=1)
    return EvaluationResult(
        pass_at_k={k: Estimate(pass_at_k(counts, n, k), *pass_interval(counts, n, k, seed=seed)) for k in ks},
        avg=float(correct.mean()),
        maj_at_k={k: maj_at_k(answers, correct, k) for k in ks},
        distinct_correct=distinct_correct(answers, correct),
        mean_reward=float(np.mean([sample.reward for sample in samples])),
        mean_length=float(np.mean([sample.drawn_tokens for sample in samples])),
        questions=len(groups),
        samples=n,
        verifier_errors=sum(bool(sample.verifier_error) for sample in samples),
        seconds=seconds,
    )
