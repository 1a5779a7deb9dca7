"""The verification stage of a step: decode every response, judge it, mark what could not be judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from pipeline.config.schema import DataConfig
from pipeline.data import DataError
from pipeline.rewards.judge import judge_of
from pipeline.rewards.pool import Outcome
from pipeline.types import Sample, SampleGroup


class VerifierFailedError(DataError):
    """A verifier could judge nothing of a step."""


class Decoder(Protocol):
    """The part of a tokenizer that verification needs."""

    def decode_batch(self, sequences: Sequence[np.ndarray]) -> list[str]:
        """Text of each id array, without end-of-sequence and padding tokens."""


class VerifierStage:
    """Fills ``text``, ``reward``, ``correct`` and ``verifier_error`` of samples; which verifier judges, each prompt
    says.

    The built-in verifiers that are linear in the text run here; the others in processes with ``verifier_timeout_s`` per
    call and ``verifier_budget_s`` for all. Episodes have their reward from their environment. A call that raises,
    hangs, dies or comes too late gives reward 0 and a ``verifier_error``; so does an aborted sample.
    """

    def __init__(self, config: DataConfig, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._judge = judge_of(config)

    def verify(self, groups: Sequence[SampleGroup], *, more: bool = False) -> list[SampleGroup]:
        """The groups with every sample judged. Raises ``UnknownVerifierError`` for a name that nobody registered.

        ``more``: they belong to the step of the last call, and share its budget.
        """
        calls = [(group.prompt, sample) for group in groups for sample in group.samples]
        texts = self._tokenizer.decode_batch([sample.last_answer for _, sample in calls])
        finished = [i for i, (_, sample) in enumerate(calls) if sample.finish_reason != "abort" and not judged(sample)]
        outcomes: list[Outcome] = [
            sample.verifier_error or sample.reward if judged(sample) else "aborted before it was finished"
            for _, sample in calls
        ]
        found = self._judge.outcomes([(calls[index][0], texts[index]) for index in finished], more=more)
        for index, outcome in zip(finished, found, strict=True):
            outcomes[index] = outcome
        verdicts = map(_with_verdict, (sample for _, sample in calls), texts, outcomes)
        return [_regroup(group, verdicts) for group in groups]

    def close(self) -> None:
        """End the worker processes. Idempotent."""
        self._judge.close()


def judged(sample: Sample) -> bool:
    """Whether an environment has said what a sample is worth, or that it cannot."""
    return bool(sample.stop_reason)


def stop_if_none_was_judged(groups: Sequence[SampleGroup], config: DataConfig) -> None:
    """Raise ``VerifierFailedError`` with the first error when not one finished sample has a verdict.

    The fault is then the verifier's or the data's, and the run would learn from rewards that are all 0. Not with
    ``data.on_verifier_error=mark``.
    """
    finished = [(g.prompt, s) for g in groups for s in g.samples if s.finish_reason != "abort" or judged(s)]
    if config.on_verifier_error == "mark" or not finished or not all(sample.verifier_error for _, sample in finished):
        return
    prompt, sample = finished[0]
    who, mend = f"verifier {prompt.verifier!r}", "the verifier or the answers (`isentrope data grade` tries both)"
    if judged(sample):
        who, mend = f"environment {config.environment.name} {config.environment.id}".rstrip(), "the environment"
    raise VerifierFailedError(
        f"{who} could judge none of {len(finished)} responses; the first, to "
        f"prompt {prompt.id!r}: {sample.verifier_error}. Mend {mend}, "
        "or set data.on_verifier_error=mark to go on with reward 0"
    )


def verdict(outcome: Outcome) -> tuple[float, str]:
    """(reward, error): an outcome that is no reward in [0, 1] is reward 0 and the reason."""
    if isinstance(outcome, str):
        return 0.0, outcome
    if 0.0 <= outcome <= 1.0:
        return outcome, ""
    return 0.0, f"reward {outcome} is outside [0, 1]"


def _with_verdict(sample: Sample, text: str, outcome: Outcome) -> Sample:
    reward, error = verdict(outcome)
    told = {"text": text, "reward": reward, "correct": reward == 1.0, "verifier_error": error}
    return Sample(**(vars(sample) | told))  # dataclasses.replace takes twice as long, thousands of times a step


def _regroup(group: SampleGroup, verdicts: Iterator[Sample]) -> SampleGroup:
    return replace(group, samples=tuple(next(verdicts) for _ in group.samples))
