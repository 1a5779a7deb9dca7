"""The verification stage of a step: decode every response, judge it, mark what could not be judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from pipeline.config.schema import DataConfig
from pipeline.rewards.pool import Outcome, VerifierPool, describe
from pipeline.rewards.verifier import Verifier, check_verifier, inline, make_verifier
from pipeline.types import Prompt, Sample, SampleGroup

# What a built-in verifier can raise on a prompt whose answer it cannot read.
_BAD_ANSWER = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Decoder(Protocol):
    """The part of a tokenizer that verification needs."""

    def decode_batch(self, sequences: Sequence[np.ndarray]) -> list[str]:
        """Text of each id array, without special tokens."""


class VerifierStage:
    """Fills ``text``, ``reward``, ``correct`` and ``verifier_error`` of samples; which verifier judges, each prompt says.

    The built-in verifiers that are linear in the text run here; the others in processes with ``verifier_timeout_s`` per
    call. A call that raises, hangs or dies gives reward 0 and a ``verifier_error``; so does an aborted sample.
    """

    def __init__(self, config: DataConfig, tokenizer: Decoder) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._pools: dict[str, VerifierPool] = {}

    def verify(self, groups: Sequence[SampleGroup]) -> list[SampleGroup]:
        """The groups with every sample judged. Raises ``UnknownVerifierError`` for a name that nobody registered."""
        texts = self._tokenizer.decode_batch([sample.token_ids for group in groups for sample in group.samples])
        calls = [(group.prompt, sample) for group in groups for sample in group.samples]
        outcomes: list[Outcome] = ["" for _ in calls]
        apart: dict[str, list[int]] = {}
        for index, (prompt, sample) in enumerate(calls):
            if sample.finish_reason == "abort":
                outcomes[index] = "aborted before it was finished"
            elif inline(prompt.verifier):
                outcomes[index] = _judge(make_verifier(prompt.verifier), prompt, texts[index])
            else:
                apart.setdefault(prompt.verifier, []).append(index)
        for verifier, indices in apart.items():
            judged = self._judge_apart(verifier, [(calls[index][0], texts[index]) for index in indices])
            for index, outcome in zip(indices, judged, strict=True):
                outcomes[index] = outcome
        verdicts = map(_with_verdict, (sample for _, sample in calls), texts, outcomes)
        return [_regroup(group, verdicts) for group in groups]

    def close(self) -> None:
        """End the worker processes. Idempotent."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _judge_apart(self, verifier: str, calls: list[tuple[Prompt, str]]) -> Iterator[Outcome]:
        """Outcomes from the verifier's pool; a response that was drawn twice is judged once."""
        check_verifier(verifier)
        if verifier not in self._pools:
            self._pools[verifier] = VerifierPool(
                verifier, self._config.verifier_workers, self._config.verifier_timeout_s
            )
        distinct = {(prompt.id, text): (prompt, text) for prompt, text in calls}
        outcomes = dict(zip(distinct, self._pools[verifier].scores(list(distinct.values())), strict=True))
        return (outcomes[prompt.id, text] for prompt, text in calls)


def _judge(verifier: Verifier, prompt: Prompt, text: str) -> Outcome:
    try:
        return verifier.score(prompt, text)
    except _BAD_ANSWER as error:
        return describe(error)


def _with_verdict(sample: Sample, text: str, outcome: Outcome) -> Sample:
    if isinstance(outcome, str):
        reward, error = 0.0, outcome
    elif 0.0 <= outcome <= 1.0:
        reward, error = outcome, ""
    else:
        reward, error = 0.0, f"reward {outcome} is outside [0, 1]"
    verdict = {"text": text, "reward": reward, "correct": reward == 1.0, "verifier_error": error}
    return Sample(**(vars(sample) | verdict))  # dataclasses.replace takes twice as long, thousands of times a step


def _regroup(group: SampleGroup, verdicts: Iterator[Sample]) -> SampleGroup:
    return replace(group, samples=tuple(next(verdicts) for _ in group.samples))
