"""Judges (prompt, response) pairs, each by the verifier that its prompt names: here, or in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pipeline.config.schema import DataConfig
from pipeline.rewards.pool import Outcome, VerifierPool, describe
from pipeline.rewards.verifier import Verifier, check_verifier, inline, make_verifier
from pipeline.rewards.verifiers.math import certainly_mathematics
from pipeline.types import Prompt

# What a built-in verifier can raise on a prompt whose answer it cannot read.
_BAD_ANSWER = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Judge:
    """The verifiers at work. Built-in ones that are linear in the text run here; the others in processes of their own.

    ``workers``: processes of a verifier, 0 for as many as CPUs. ``timeout``: seconds per call. ``budget``: seconds for
    all the responses of a step, 0 for what ``VerifierPool.budget`` gives them. ``folder``: where modules of
    the user's own are looked for first.
    """

    def __init__(self, workers: int, timeout: float, budget: float, folder: str) -> None:
        self._workers = workers
        self._timeout = timeout
        self._budget = budget
        self._folder = folder
        self._pools: dict[str, VerifierPool] = {}
        self._step: dict[str, tuple[int, float]] = {}  # by verifier: calls of this step so far, and their seconds

    def outcomes(self, calls: Sequence[tuple[Prompt, str]], *, more: bool = False) -> list[Outcome]:
        """A reward, or why there is none, for every (prompt, response). Raises ``UnknownVerifierError``.

        ``more``: they belong to the step of the last call, and share its budget.
        """
        if not more:
            self._step.clear()
        outcomes: list[Outcome] = ["" for _ in calls]
        apart: dict[str, list[int]] = {}
        for index, (prompt, text) in enumerate(calls):
            if inline(prompt.verifier):
                outcomes[index] = _judge(make_verifier(prompt.verifier), prompt, text)
            else:
                apart.setdefault(prompt.verifier, []).append(index)
        for verifier, indices in apart.items():
            judged = self._judge_apart(verifier, [calls[index] for index in indices])
            for index, outcome in zip(indices, judged, strict=True):
                outcomes[index] = outcome
        return outcomes

    def refusals(self, prompts: Sequence[Prompt]) -> list[str]:
        """For every prompt why its reference cannot be matched, or "". Raises ``UnknownVerifierError``.

        A verifier says so itself (``Verifier.refusal``); equal references of a verifier are tried once.
        """
        found: dict[tuple[str, str], str] = {}
        apart: dict[str, dict[tuple[str, str], Prompt]] = {}
        keys = [_reference_key(prompt) for prompt in prompts]
        for key, prompt in zip(keys, prompts, strict=True):
            if key in found:
                continue
            if quick(prompt):
                found[key] = make_verifier(prompt.verifier).refusal(prompt) if inline(prompt.verifier) else ""
            else:
                apart.setdefault(prompt.verifier, {})[key] = prompt
        for verifier, asked in apart.items():
            found |= dict(zip(asked, self._pool(verifier).refusals(list(asked.values())), strict=True))
        return [found[key] for key in keys]

    def close(self) -> None:
        """End the worker processes. Idempotent."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _pool(self, verifier: str) -> VerifierPool:
        check_verifier(verifier, self._folder)
        if verifier not in self._pools:
            self._pools[verifier] = VerifierPool(verifier, self._folder, self._workers, self._timeout)
        return self._pools[verifier]

    def _judge_apart(self, verifier: str, calls: list[tuple[Prompt, str]]) -> Iterator[Outcome]:
        """Outcomes from the verifier's pool; a response that was drawn twice is judged once."""
        distinct = {(prompt.id, text): (prompt, text) for prompt, text in calls}
        pool, (number, seconds) = self._pool(verifier), self._step.get(verifier, (0, 0.0))
        number += len(distinct)
        budget, started = self._budget or pool.budget(number), time.monotonic()
        judged = pool.scores(list(distinct.values()), budget, seconds)
        self._step[verifier] = number, seconds + time.monotonic() - started
        outcomes = dict(zip(distinct, judged, strict=True))
        return (outcomes[prompt.id, text] for prompt, text in calls)


def judge_of(config: DataConfig) -> Judge:
    """The verifiers at work as ``config`` has them."""
    return Judge(config.verifier_workers, config.verifier_timeout_s, config.verifier_budget_s, config.verifier_folder)


def quick(prompt: Prompt) -> bool:
    """Whether a reference needs no process of its own to be tried: an inline verifier, a user's function, plain
    mathematics.
    """
    if inline(prompt.verifier) or ":" in prompt.verifier:
        return True
    return prompt.verifier == "math" and certainly_mathematics(prompt.answer)


def _reference_key(prompt: Prompt) -> tuple[str, str]:
    apart = prompt.id if prompt.verifier == "reasoning_gym" else ""  # its reference is the whole entry
    return prompt.verifier, apart or repr(prompt.answer)


def _judge(verifier: Verifier, prompt: Prompt, text: str) -> Outcome:
    try:
        return verifier.score(prompt, text)
    except _BAD_ANSWER as error:
        return describe(error)
