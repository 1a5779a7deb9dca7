"""Prompts from a JSONL file: one object a line with ``id``, ``prompt`` or ``messages``, ``answer``, ``verifier``,
``meta``.

Every malformed line is found before anything else happens, and reported with file, line number and reason.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data import DataError
from pipeline.data.questions import Question
from pipeline.rewards.judge import Judge
from pipeline.rewards.verifier import UnknownVerifierError, check_verifier
from pipeline.types import Prompt

_KEYS = ("id", "prompt", "messages", "answer", "verifier", "meta")
_ROLES = ("system", "user", "assistant")
_LONGEST_REFERENCE_S = 5.0  # for a verifier to compare a reference with itself
_REPORTED = 10  # malformed lines described one by one


def read_jsonl(path: Path | str, verifier: str) -> list[Question]:
    """The questions of a file. ``verifier`` is used for every line, unless it is "auto": then each line names its own.

    Raises ``DataError`` listing the malformed lines (ten in full, then their number), or when the file is missing or
    empty.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data.source.path={path}: no such file; give a JSONL file with the keys {', '.join(_KEYS)}")
    questions: list[Question] = []
    faults: list[str] = []
    line_of: dict[str, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                question = _question(line, verifier)
                if question.id in line_of:
                    raise DataError(f"duplicate id {question.id!r}, first on line {line_of[question.id]}")
            except (DataError, UnknownVerifierError) as error:
                faults.append(f"  {path}:{number}: {error}")
                continue
            line_of[question.id] = number
            questions.append(question)
    faults += [f"  {path}:{line_of[question.id]}: {reason}" for question, reason in _refused(questions) if reason]
    if faults:
        raise DataError(_report(path, faults))
    if not questions:
        raise DataError(f"data.source.path={path}: the file is empty; it needs one JSON object a line")
    return questions


def _refused(questions: Sequence[Question]) -> Iterator[tuple[Question, str]]:
    """Every question with the reason why no response could match its reference answer, or ""."""
    judge = Judge(workers=0, timeout=_LONGEST_REFERENCE_S)
    asked = [Prompt(each.id, (), "", each.answer, each.verifier, each.meta) for each in questions]
    try:
        yield from zip(questions, judge.refusals(asked), strict=True)
    finally:
        judge.close()


def _question(line: bytes, verifier: str) -> Question:
    """One line. Raises ``DataError`` or ``UnknownVerifierError`` with the reason."""
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(item, dict):
        raise DataError(f"must be a JSON object, not {type(item).__name__}")
    for key in item:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise DataError(f"unknown key {key!r}, nearest is {nearest!r}; put further data under 'meta'")
    if not isinstance(item.get("id"), str | int) or isinstance(item["id"], bool) or item["id"] == "":
        raise DataError(f"'id' must be a non-empty string or an integer, not {item.get('id')!r}")
    if "answer" not in item:
        raise DataError("'answer' is missing")
    if not isinstance(item.get("meta", {}), dict):
        raise DataError(f"'meta' must be an object, not {item['meta']!r}")
    text, messages = _conversation(item)
    return Question(
        id=str(item["id"]),
        answer=item["answer"],
        verifier=_verifier(item, verifier),
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


def _verifier(item: dict[str, Any], override: str) -> str:
    if override != "auto":
        return override
    name = item.get("verifier")
    if not isinstance(name, str):
        raise DataError("'verifier' is missing: name one here, or one for all lines with data.verifier")
    check_verifier(name)
    return name


def _report(path: Path, faults: list[str]) -> str:
    shown = faults[:_REPORTED]
    if len(faults) > len(shown):
        shown.append(f"  ... and {len(faults) - len(shown)} more")
    lines = "1 malformed line" if len(faults) == 1 else f"{len(faults)} malformed lines"
    return "\n".join([f"data.source.path={path}: {lines}; mend or remove:", *shown])
