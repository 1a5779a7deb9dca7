"""Answers a benchmark question by question, so that the work can be interrupted, resumed and divided over machines.

``<out>/<name>/responses-<i>-of-<n>.jsonl`` holds the settings in its first line, then one line per question with all
its samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import DataConfig
from pipeline.data import DataError
from pipeline.evaluation.metrics import distinct_correct, maj_at_k, pass_at_k, pass_interval
from pipeline.monitoring.events import cut_torn_line
from pipeline.rewards.answers import grouped_answers
from pipeline.rewards.stage import VerifierStage, stop_if_none_was_judged
from pipeline.seeds import sample_seeds
from pipeline.types import GenerateRequest, Prompt, Role, SampleGroup

SAMPLES_PER_CALL = 4096  # what an engine is given at once; a run that is broken off loses at most these
INTERVAL_SEED = 0

# How papers decode (docs/benchmarking.md): avg@32 at T=0.6 and top_p=0.95; pass@k from the untruncated policy at T=1.
DECODINGS = {"avg": (0.6, 0.95, 32), "pass": (1.0, 1.0, 64)}


@dataclass(frozen=True)
class Settings:
    """What decides the answers beside the questions."""

    model: str
    step: int  # updates behind the weights; 0: the model as it is
    temperature: float
    top_p: float
    samples: int  # per question
    max_new_tokens: int
    seed: int
    environment: str  # that the answers met


Generate = Callable[[Sequence[GenerateRequest]], Sequence[SampleGroup]]


def answer(
    prompts: Sequence[Prompt],
    settings: Settings,
    file: Path,
    generate: Generate,
    verifier: VerifierStage,
    data: DataConfig,
    done: Callable[[int], None],
) -> None:
    """Answer those of ``prompts`` that ``file`` does not hold yet; ``done`` is told how many questions it holds.

    Raises ``DataError`` when the file was written with other settings, ``VerifierFailedError`` when not one response of
    a batch could be judged and ``data.on_verifier_error`` is not ``mark``: that batch is not kept.
    """
    held = {line["id"] for line in _open(file, settings)}
    left = [prompt for prompt in prompts if prompt.id not in held]
    done(len(prompts) - len(left))
    size = max(1, SAMPLES_PER_CALL // settings.samples)
    for start in range(0, len(left), size):
        part = left[start : start + size]
        groups = verifier.verify(generate([_request(prompt, settings) for prompt in part]))
        stop_if_none_was_judged(groups, data)
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(_line(group), ensure_ascii=False) + "\n" for group in groups)
            out.flush()
            os.fsync(out.fileno())
        done(len(prompts) - len(left) + start + len(part))


def read_answers(folder: Path) -> tuple[Settings, list[dict[str, Any]]]:
    """Settings and answers of all shards in a benchmark's folder, by question. Raises ``DataError``."""
    shards = {file: lines for file in sorted(folder.glob("responses-*.jsonl")) if (lines := _lines(file))}
    if not shards:
        raise DataError(f"{folder} holds no responses: run `isentrope benchmark run` first")
    first = next(iter(shards))
    settings = shards[first][0]
    for file, (head, *_) in shards.items():
        if head != settings:
            raise DataError(
                f"{file} was drawn with {head}, {first} with {settings}: they cannot be one result; remove one"
            )
    by_id = {line["id"]: line for _, *lines in shards.values() for line in lines}
    return Settings(**settings), sorted(by_id.values(), key=lambda line: int(line["id"].rpartition("/")[2]))


def figures(lines: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """avg@n, pass@k and maj@k with 95 % intervals over questions and samples.

    ``lines`` as ``read_answers`` gives them.
    """
    samples = [line["samples"] for line in lines]
    n = len(samples[0])
    correct = np.array([[sample["correct"] for sample in row] for row in samples])
    answers = [
        grouped_answers(line["verifier"], [s["text"] for s in line["samples"]], [s["correct"] for s in line["samples"]])
        for line in lines
    ]
    counts = correct.sum(axis=1)

    def estimate(k: int) -> dict[str, float]:
        low, high = pass_interval(counts, n, k, seed=INTERVAL_SEED)
        return {"value": pass_at_k(counts, n, k), "low": low, "high": high}

    return {
        "questions": len(lines),
        "samples": n,
        "avg": estimate(1),  # pass@1 is the share of correct samples
        "pass_at_k": {str(k): estimate(k) for k in ks if k <= n},
        "maj_at_k": {str(k): maj_at_k(answers, correct, k) for k in ks if k <= n},
        "distinct_correct": distinct_correct(answers, correct),
        "mean_length": float(np.mean([sample["tokens"] for row in samples for sample in row])),
        "truncated": float(np.mean([sample["finish_reason"] == "length" for row in samples for sample in row])),
        "verifier_errors": sum(bool(sample["verifier_error"]) for row in samples for sample in row),
    }


def _request(prompt: Prompt, settings: Settings) -> GenerateRequest:
    seeds = sample_seeds(settings.seed, settings.step, prompt.id, settings.samples, Role.EVALUATION)
    return GenerateRequest(
        prompt, seeds, settings.temperature, settings.max_new_tokens, Role.EVALUATION, top_p=settings.top_p
    )


def _line(group: SampleGroup) -> dict[str, Any]:
    return {
        "id": group.prompt.id,
        "verifier": group.prompt.verifier,
        "answer": group.prompt.answer,
        "samples": [
            {
                "text": sample.text,
                "correct": sample.correct,
                "tokens": sample.drawn_tokens,
                "finish_reason": sample.finish_reason,
                "verifier_error": sample.verifier_error,
            }
            for sample in group.samples
        ],
    }


def _open(file: Path, settings: Settings) -> list[dict[str, Any]]:
    """What the file holds already, its torn last line cut off; a new file gets its first line."""
    cut_torn_line(file)
    if not file.exists() or not file.stat().st_size:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(settings)) + "\n")
        return []
    head, *lines = _lines(file)
    if head != asdict(settings):
        changed = ", ".join(
            f"{name} {head.get(name)!r}, now {value!r}"
            for name, value in asdict(settings).items()
            if head.get(name) != value
        )
        raise DataError(f"{file} was begun with other settings ({changed}): choose another --out, or remove the file")
    return lines


def _lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file, its settings first; none of one that ended in its first."""
    lines = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{file}:{number}: not JSON: {error}; remove the line, its question is answered again"
            ) from error
    return lines
