"""Grades a file of ``{"verifier", "answer", "response"}`` lines: what a verifier says of known responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import DataConfig
from pipeline.data import DataError
from pipeline.data.lines import json_object
from pipeline.rewards.judge import judge_of
from pipeline.rewards.stage import verdict
from pipeline.rewards.verifier import UnknownVerifierError, check_verifier, extracted
from pipeline.types import Prompt

_KEYS = ("verifier", "answer", "response")


@dataclass(frozen=True)
class Grade:
    """What the verifier said of one line."""

    line: int  # in the file, from 1
    reward: float  # in [0, 1]; 0 where there is an error
    extracted: str | None  # what the verifier took for the response's answer; None: it found none
    error: str  # "" or why the verifier could not judge


def grade_file(path: Path, config: DataConfig) -> list[Grade]:
    """The grades of all lines, in order; keys beside the three (and ``meta``) are left alone.

    ``config`` says how verifiers run, and where a user's own is looked for; which one judges, each line says.
    Raises ``DataError`` naming file and line of everything that is malformed, and of references that are refused.
    """
    if not path.is_file():
        raise DataError(f"{path.absolute()}: no such file; give JSON lines with the keys {', '.join(_KEYS)}")
    calls: dict[int, tuple[Prompt, str]] = {}
    faults: list[tuple[int, str]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                calls[number] = _call(line, number, config.verifier_folder)
            except (DataError, UnknownVerifierError) as error:
                faults.append((number, str(error)))
    judge = judge_of(config)
    try:
        refusals = judge.refusals([prompt for prompt, _ in calls.values()])
        faults += [(number, reason) for number, reason in zip(calls, refusals, strict=True) if reason]
        if faults:
            raise DataError("\n".join(f"{path}:{number}: {reason}" for number, reason in sorted(faults)))
        return _grades(calls, judge.outcomes(list(calls.values())))
    finally:
        judge.close()


def _call(line: bytes, number: int, folder: str) -> tuple[Prompt, str]:
    item = json_object(line)
    for key in _KEYS:
        if key not in item:
            raise DataError(f"{key!r} is missing: a line needs {', '.join(_KEYS)}")
    for key in ("verifier", "response"):
        if not isinstance(item[key], str):
            raise DataError(f"{key!r} must be a string, not {item[key]!r}")
    if not isinstance(item.get("meta", {}), dict):
        raise DataError(f"'meta' must be an object, not {item['meta']!r}")
    check_verifier(item["verifier"], folder)
    prompt = Prompt(f"line {number}", (), "", item["answer"], item["verifier"], item.get("meta", {}))
    return prompt, item["response"]


def _grades(calls: dict[int, tuple[Prompt, str]], outcomes: Sequence[float | str]) -> list[Grade]:
    grades = []
    for (number, (prompt, text)), outcome in zip(calls.items(), outcomes, strict=True):
        reward, error = verdict(outcome)
        grades.append(Grade(number, reward, extracted(prompt.verifier, text), error))
    return grades
