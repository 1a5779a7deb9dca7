"""Writes and reads the rollouts that a run keeps: ``samples/step-N.jsonl``, one JSON object per rollout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Required, TypedDict

import msgspec
import numpy as np

from pipeline.data.tokenizer import Tokenizer
from pipeline.monitoring.events import to_json
from pipeline.rewards.verifier import extracted
from pipeline.types import KeptSample, Sample

log = logging.getLogger(__name__)


def write_samples(folder: Path, step: int, kept: Sequence[KeptSample], tokenizer: Tokenizer | None) -> None:
    """Write the rollouts of one step into ``folder``; no file where there are none.

    A file that cannot be written is said in the process's log and left out: training does not depend on it.
    """
    if not kept:
        return
    path = folder / f"step-{step:06d}.jsonl"
    text = "".join(to_json(described(sample, step, tokenizer)) + "\n" for sample in kept)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        log.warning("%s: the samples of this step are not kept: %s", path, error)
        with suppress(OSError):
            path.unlink(missing_ok=True)  # readers would take a part for the whole


def described(kept: KeptSample, step: int, tokenizer: Tokenizer | None) -> dict[str, object]:
    """The fields of a rollout in its file (docs/events.md). ``pieces`` is empty without a tokenizer."""
    sample, opening = kept.sample, _opening(kept)
    pieces = tokenizer.pieces(sample.token_ids) if tokenizer else []
    return {
        "step": step,
        "prompt_id": kept.prompt.id,
        "prompt": "".join(pieces[:opening]) or kept.prompt.text,
        "answer": kept.prompt.answer,
        "response": sample.text,
        "extracted": None if sample.finish_reason == "abort" else extracted(kept.prompt.verifier, sample.text),
        "reward": sample.reward,
        "role": str(sample.role),
        "temperature": sample.temperature,
        "tokens": sample.drawn_tokens,
        "finish_reason": sample.finish_reason,
        "weight_versions": [
            [span.version, span.start - opening, span.end - opening] for span in sample.weight_versions
        ],
        "verifier_error": sample.verifier_error,
        "seed": sample.seed,
        "pieces": pieces[opening:],
        "log_probs": _at_drawn(sample, sample.of_drawn(sample.log_probs))[opening:],
        **({} if kept.entropies is None else {"entropies": _at_drawn(sample, kept.entropies)[opening:]}),
        **_episode(sample, opening),
    }


def _opening(kept: KeptSample) -> int:
    """How many of a sample's tokens are its prompt: those before the first answer, where a client wrote the prompt."""
    return 0 if kept.prompt.token_ids or not kept.sample.turns else kept.sample.turns[0].start


def _episode(sample: Sample, opening: int) -> dict[str, object]:
    """What an episode has beside a single answer's fields."""
    if not sample.stop_reason:
        return {}
    turns = [[turn.start - opening, turn.end - opening, turn.finish_reason] for turn in sample.turns]
    return {"turns": turns, "stop_reason": sample.stop_reason}


class _Kept(TypedDict, total=False):
    """What readers may trust of a line; the fields are those of ``described``."""

    step: Required[int]
    prompt_id: str
    prompt: Required[str]
    answer: Any
    response: Required[str]
    extracted: str | None
    reward: Required[float | None]
    role: Required[str]
    temperature: Required[float]
    tokens: Required[int]
    finish_reason: str
    weight_versions: list[list[int]]
    verifier_error: str
    seed: Required[int]
    pieces: list[str]
    log_probs: list[float | None]
    entropies: list[float | None]
    turns: list[tuple[int, int, str]]
    stop_reason: str


_DECODER = msgspec.json.Decoder(_Kept)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rollouts of a file with the number of their line as ``index``.

    Lines that are none, or not yet whole, are left out.
    """
    found = []
    for index, line in enumerate(path.read_bytes().splitlines() if path.is_file() else []):
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found.append({"index": index, **_DECODER.decode(line)})
    return found


def _at_drawn(sample: Sample, values: np.ndarray) -> list[float | None]:
    """One of ``values`` for each token that the model drew, None for the others."""
    rounded = (round(value, 3) for value in values.tolist())
    if sample.drawn is None:
        return list(rounded)
    return [next(rounded) if drawn else None for drawn in sample.drawn.tolist()]
