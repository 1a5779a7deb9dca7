"""Looks through a data source before a run: how prompts read and how long they are, what is dropped, what
occurs twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.schema import RunConfig
from pipeline.data.questions import Question
from pipeline.data.sources import read_questions, to_prompt
from pipeline.data.tokenizer import Tokenizer

PERCENTILES = {"least": 0, "median": 50, "p95": 95, "longest": 100}


@dataclass(frozen=True)
class DataReport:
    """What ``check_data`` found.

    Lengths are in tokens of the whole rendered prompt; without a tokenizer there are none.
    """

    questions: int
    verifiers: dict[str, int]  # questions by verifier
    example: dict[str, object]  # the first question: id, prompt as the model reads it, answer, verifier
    lengths: dict[str, float]  # by the names of ``PERCENTILES``
    too_long: dict[str, int]  # id -> tokens, of prompts beyond ``rollout.max_prompt_tokens``
    duplicates: list[list[str]]  # ids of questions that ask the same


def check_data(config: RunConfig, tokenizer: Tokenizer | None) -> DataReport:
    """Read every question of ``config.data.source`` and render it as training would.

    Raises ``DataError`` as training would: lines that cannot be read, references that their verifier does not accept.
    """
    questions = read_questions(config.data)
    shown: object = questions[0].messages or questions[0].text
    lengths: dict[str, int] = {}
    if tokenizer is not None:
        prompts = [to_prompt(question, config.data, tokenizer) for question in questions]
        lengths = {prompt.id: len(prompt.token_ids) for prompt in prompts}
        shown = prompts[0].text
    named = [question.verifier if config.data.verifier == "auto" else config.data.verifier for question in questions]
    limit = config.rollout.max_prompt_tokens
    return DataReport(
        questions=len(questions),
        verifiers=dict(Counter(named)),
        example={"id": questions[0].id, "prompt": shown, "answer": questions[0].answer, "verifier": named[0]},
        lengths=_percentiles(list(lengths.values())),
        too_long={name: length for name, length in lengths.items() if length > limit},
        duplicates=_duplicates(questions),
    )


def _percentiles(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    found = np.percentile(lengths, list(PERCENTILES.values())).tolist()
    return dict(zip(PERCENTILES, found, strict=True))


def _duplicates(questions: Sequence[Question]) -> list[list[str]]:
    """Ids by question, of those that are asked more than once."""
    ids: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        ids[repr(question.messages or question.text)].append(question.id)
    return [same for same in ids.values() if len(same) > 1]
