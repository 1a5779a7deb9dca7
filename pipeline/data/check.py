"""Looks through a data source before a run: how prompts read and how long they are, what is dropped, what
occurs twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.schema import RunConfig
from pipeline.data import DataError
from pipeline.data.jsonl import Fault
from pipeline.data.questions import Question
from pipeline.data.sources import examine_questions, to_prompt
from pipeline.data.tokenizer import Tokenizer
from pipeline.types import Prompt

PERCENTILES = {"least": 0, "median": 50, "p95": 95, "longest": 100}


@dataclass(frozen=True)
class DataReport:
    """What ``check_data`` found.

    Lengths are in tokens of the whole rendered prompt; without a tokenizer there are none.
    """

    questions: int
    verifiers: dict[str, int]  # questions by verifier
    example: dict[str, object]  # the first question: id, prompt as the model reads it, answer, verifier; {} for none
    lengths: dict[str, float]  # by the names of ``PERCENTILES``
    too_long: dict[str, int]  # id -> tokens, of prompts beyond ``rollout.max_prompt_tokens``
    duplicates: list[list[str]]  # ids of questions that ask the same
    faults: list[Fault]  # lines of the file that cannot be used; training would stop at them
    not_rendered: dict[str, str]  # id -> why the tokenizer or its chat template does not take the prompt


def check_data(config: RunConfig, tokenizer: Tokenizer | None) -> DataReport:
    """Read every question of ``config.data.source`` and render it as training would.

    Raises ``DataError`` where there is nothing to look through: no file, no such task, no such verifier.
    """
    questions, faults = examine_questions(config.data)
    prompts: dict[str, Prompt] = {}
    not_rendered: dict[str, str] = {}
    for question in questions:
        if tokenizer is None:
            break
        try:
            prompts[question.id] = to_prompt(question, config.data, tokenizer)
        except DataError as error:
            not_rendered[question.id] = str(error)
    named = [question.verifier if config.data.verifier == "auto" else config.data.verifier for question in questions]
    lengths = {name: len(prompt.token_ids) for name, prompt in prompts.items()}
    limit = config.rollout.max_prompt_tokens
    return DataReport(
        questions=len(questions),
        verifiers=dict(Counter(named)),
        example=_example(questions[0], named[0], prompts) if questions else {},
        lengths=_percentiles(list(lengths.values())),
        too_long={name: length for name, length in lengths.items() if length > limit},
        duplicates=_duplicates(questions),
        faults=faults,
        not_rendered=not_rendered,
    )


def _example(question: Question, verifier: str, prompts: Mapping[str, Prompt]) -> dict[str, object]:
    rendered = prompts.get(question.id)
    shown = rendered.text if rendered else question.messages or question.text
    return {"id": question.id, "prompt": shown, "answer": question.answer, "verifier": verifier}


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
