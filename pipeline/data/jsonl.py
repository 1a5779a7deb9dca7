"""Prompts from a JSONL file: one object a line with ``id``, ``prompt`` or ``messages``, ``answer``, ``verifier``,
``meta``.

Every malformed line is found before anything else happens, and reported with file, line number and reason.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import DataConfig
from pipeline.data import DataError
from pipeline.data.lines import json_object
from pipeline.data.questions import Question
from pipeline.rewards.judge import judge_of
from pipeline.rewards.verifier import UnknownVerifierError, check_verifier
from pipeline.types import Prompt

_KEYS = ("id", "prompt", "messages", "answer", "verifier", "meta")
# What other data sets call them; without this table the nearest spelling of "question" would be "messages".
_MEANT = {
    **dict.fromkeys(("question", "problem", "query", "instruction", "input", "text"), "prompt"),
    **dict.fromkeys(("conversation", "conversations", "chat"), "messages"),
    **dict.fromkeys(("ground_truth", "solution", "reference", "target", "label", "output", "expected"), "answer"),
    **dict.fromkeys(("reward", "reward_fn", "grader"), "verifier"),
    **dict.fromkeys(("index", "idx", "uid", "uuid"), "id"),
}
_ROLES = ("system", "user", "assistant")
_REPORTED = 10  # malformed lines described one by one


@dataclass(frozen=True)
class Fault:
    """A line that cannot be used."""

    line: int  # from 1
    problem: str


def read_jsonl(path: Path | str, config: DataConfig) -> list[Question]:
    """The questions of a file.

    Raises ``DataError`` listing the lines that cannot be used (ten reasons in full, then the number of lines left), or
    when the file is missing or empty.
    """
    questions, faults = examine_jsonl(path, config)
    if faults:
        raise DataError(_report(Path(path), faults))
    return questions


def examine_jsonl(path: Path | str, config: DataConfig) -> tuple[list[Question], list[Fault]]:
    """The questions of a file, and every line that cannot be used: malformed, or with a reference that no response
    could match.

    ``config.verifier`` is used for every line, unless it is "auto": then each line names its own. Raises ``DataError``
    when the file is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data.source.path={path}: no such file; give a JSONL file with the keys {', '.join(_KEYS)}")
    questions: list[Question] = []
    faults: list[Fault] = []
    line_of: dict[str, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                question = _question(line, config)
                if question.id in line_of:
                    raise DataError(f"duplicate id {question.id!r}, first on line {line_of[question.id]}")
            except (DataError, UnknownVerifierError) as error:
                faults.append(Fault(number, str(error)))
                continue
            line_of[question.id] = number
            questions.append(question)
    if not questions and not faults:
        raise DataError(f"data.source.path={path}: the file is empty; it needs one JSON object a line")
    accepted = []
    for question, reason in _refused(questions, config):
        if reason:
            faults.append(Fault(line_of[question.id], reason))
        else:
            accepted.append(question)
    return accepted, sorted(faults, key=lambda fault: fault.line)


def _refused(questions: Sequence[Question], config: DataConfig) -> Iterator[tuple[Question, str]]:
    """Every question with the reason why no response could match its reference answer, or ""."""
    judge = judge_of(config)
    asked = [Prompt(each.id, (), "", each.answer, each.verifier, each.meta) for each in questions]
    try:
        yield from zip(questions, judge.refusals(asked), strict=True)
    finally:
        judge.close()


def _question(line: bytes, config: DataConfig) -> Question:
    """One line. Raises ``DataError`` or ``UnknownVerifierError`` with the reason."""
    item = json_object(line)
    for key in item:
        if key not in _KEYS:
            nearest = _MEANT.get(key) or difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise DataError(f"unknown key {key!r}, nearest is {nearest!r}; put further data under 'meta'")
    if "id" not in item:
        raise DataError("'id' is missing: give each line a text or an integer that no other line has")
    if not isinstance(item["id"], str | int) or isinstance(item["id"], bool) or item["id"] == "":
        raise DataError(f"'id' must be a non-empty string or an integer, not {item['id']!r}")
    if "answer" not in item:
        raise DataError("'answer' is missing")
    if not isinstance(item.get("meta", {}), dict):
        raise DataError(f"'meta' must be an object, not {item['meta']!r}")
    text, messages = _conversation(item)
    return Question(
        id=str(item["id"]),
        answer=item["answer"],
        verifier=_verifier(item, config),
        text=text,
        messages=messages,
        meta=item.get("meta", {}),
    )


def _conversation(item: dict[str, Any]) -> tuple[str, tuple[dict[str, str], ...]]:
    if ("prompt" in item) == ("messages" in item):
        raise DataError("exactly one of 'prompt' and 'messages' must be given")
    if "prompt" in item:
        if not isinstance(item["prompt"], str) or not item["prompt"]:
            raise DataError(f"'prompt' must be a non-empty string, not {item['prompt']!r}")
        return item["prompt"], ()
    messages = item["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'messages' must be a non-empty list, not {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"each message needs a 'role' out of {', '.join(_ROLES)}: {message!r}")
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise DataError(f"each message holds 'role' and 'content', a string, and nothing else: {message!r}")
    return "", tuple(messages)


def _verifier(item: dict[str, Any], config: DataConfig) -> str:
    if config.verifier != "auto":
        return config.verifier
    name = item.get("verifier", "")
    if not isinstance(name, str):
        raise DataError(f"'verifier' must be a name, not {name!r}")
    if not name:
        raise DataError("'verifier' is missing: name one here, or one for all lines with data.verifier")
    check_verifier(name, config.verifier_folder)
    return name


def _report(path: Path, faults: list[Fault]) -> str:
    lines = "1 malformed line" if len(faults) == 1 else f"{len(faults)} malformed lines"
    return "\n".join([f"data.source.path={path}: {lines}; mend or remove:", *described(path, faults, _REPORTED)])


def described(path: Path | str, faults: Sequence[Fault], shown: int) -> list[str]:
    """A line for each reason, ``shown`` at most: the first line of the file that has it, and how many more have it."""
    lines = defaultdict[str, list[int]](list)
    for fault in faults:
        lines[fault.problem].append(fault.line)
    told = []
    for problem, (first, *others) in list(lines.items())[:shown]:
        more = f" (and {len(others)} more lines, the last {others[-1]})" if others else ""
        told.append(f"  {path}:{first}: {problem}{more}")
    left = sum(map(len, list(lines.values())[shown:]))
    return [*told, f"  ... and {left} more"] if left else told
