"""Samples that wait for a later step, and the form in which a checkpoint keeps them.

What grows with the tokens is kept in flat arrays over all samples, one sample behind the other, with the length of
each: ``token_ids`` int32, ``log_probs`` float32, ``text`` (UTF-8) uint8, ``weight_versions`` int64 [spans, 3] (version,
start, end), ``old_log_probs`` float32 (of every row the part that is not 0). Prompts and the small fields of samples
are JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pipeline.types import ControlDecision, Prompt, Role, Sample, SampleGroup, StepSamples, WeightSpan

_SMALL = ("temperature", "seed", "finish_reason", "reward", "correct", "verifier_error")  # fields of a sample


@dataclass(frozen=True)
class Drawn:
    """Samples of one step, and what they were drawn with."""

    version: int  # of the weights
    decision: ControlDecision  # in force at the time
    samples: StepSamples
    old_log_probs: torch.Tensor | None = None  # float32 [rows, seq - 1] at T=1, of their batch; None: on-policy


def plain_of(waiting: Iterable[Drawn]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The fields that JSON keeps, one entry for each step, and the arrays over all of them."""
    waiting = list(waiting)
    samples = [sample for drawn in waiting for group in _groups(drawn.samples) for sample in group.samples]
    texts = [sample.text.encode("utf-8", "surrogatepass") for sample in samples]
    spans = [[(span.version, span.start, span.end) for span in sample.weight_versions] for sample in samples]
    rows = [_trimmed(drawn.old_log_probs.numpy()) for drawn in waiting if drawn.old_log_probs is not None]
    arrays = {
        "token_ids": _joined([sample.token_ids for sample in samples], np.int32),
        "log_probs": _joined([sample.log_probs for sample in samples], np.float32),
        "token_counts": np.array([len(sample.token_ids) for sample in samples], np.int64),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_bytes": np.array([len(text) for text in texts], np.int64),
        "weight_versions": np.array([span for of_sample in spans for span in of_sample], np.int64).reshape(-1, 3),
        "span_counts": np.array([len(of_sample) for of_sample in spans], np.int64),
        "old_log_probs": _joined([values for values, _ in rows], np.float32),
        "old_columns": np.concatenate([np.empty((0, 2), np.int64), *[columns for _, columns in rows]]),
    }
    return [_fields(drawn) for drawn in waiting], arrays


def drawn_of(fields: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> list[Drawn]:
    """What ``plain_of`` was given, bit for bit."""
    samples, rows = _samples(arrays), _rows(arrays)

    def group(state: Mapping[str, Any]) -> SampleGroup:
        role = Role(state["role"])
        prompt = Prompt(**{**state["prompt"], "token_ids": tuple(state["prompt"]["token_ids"])})
        drawn = tuple(Sample(**next(samples), **small, role=role) for small in state["samples"])
        return SampleGroup(prompt, drawn, role)

    def step(state: Mapping[str, Any]) -> Drawn:
        main, auxiliary, repeated = (
            [group(each) for each in state[part]] for part in ("main", "auxiliary", "repeated")
        )
        old = None if state["old_shape"] is None else torch.from_numpy(_grid(state["old_shape"], rows))
        return Drawn(
            state["version"],
            ControlDecision(**state["decision"]),
            StepSamples(main, auxiliary, state["stale"], repeated),
            old,
        )

    return [step(state) for state in fields]


def _fields(drawn: Drawn) -> dict[str, Any]:
    samples, old = drawn.samples, drawn.old_log_probs
    return {
        "version": drawn.version,
        "decision": asdict(drawn.decision),
        "main": [_group_fields(group) for group in samples.main],
        "auxiliary": [_group_fields(group) for group in samples.auxiliary],
        "repeated": [_group_fields(group) for group in samples.repeated],
        "stale": samples.stale,
        "old_shape": None if old is None else list(old.shape),
    }


def _group_fields(group: SampleGroup) -> dict[str, Any]:
    small = [{name: getattr(sample, name) for name in _SMALL} for sample in group.samples]
    return {"prompt": vars(group.prompt), "role": str(group.role), "samples": small}


def _groups(samples: StepSamples) -> Iterator[SampleGroup]:
    """In the order in which the fields and the arrays hold them."""
    yield from samples.main
    yield from samples.auxiliary
    yield from samples.repeated


def _samples(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """The large fields of one sample after the other."""
    columns = (
        _split(arrays["token_ids"].astype(np.int64), arrays["token_counts"]),
        _split(arrays["log_probs"], arrays["token_counts"]),
        _split(arrays["text"], arrays["text_bytes"]),
        _split(arrays["weight_versions"], arrays["span_counts"]),
    )
    for token_ids, log_probs, text, spans in zip(*columns, strict=True):
        yield {
            "token_ids": token_ids,
            "log_probs": log_probs,
            "text": text.tobytes().decode("utf-8", "surrogatepass"),
            "weight_versions": tuple(WeightSpan(version, start, end) for version, start, end in spans.tolist()),
        }


def _rows(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """The column at which a row's old log-probs begin, and these."""
    columns = arrays["old_columns"]
    return zip(columns[:, 0].tolist(), _split(arrays["old_log_probs"], columns[:, 1] - columns[:, 0]), strict=True)


def _trimmed(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every row of a float32 grid the part from the first to the last entry that is not 0, and its columns.

    The parts are one flat array; the columns int64 [rows, 2], where a part begins and the column behind its end.
    """
    filled = grid.view(np.int32) != 0  # by its bits: -0.0 stays
    width = grid.shape[1]
    start = np.where(filled.any(1), filled.argmax(1), 0)
    end = np.where(filled.any(1), width - filled[:, ::-1].argmax(1), 0)
    column = np.arange(width)
    inside = (column >= start[:, None]) & (column < end[:, None])
    return grid[inside], np.stack([start, end], axis=1).astype(np.int64)


def _grid(shape: Sequence[int], rows: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
    """A float32 grid of the next ``shape[0]`` rows, 0 outside them."""
    grid = np.zeros(shape, np.float32)
    for row in grid:
        start, values = next(rows)
        row[start : start + len(values)] = values
    return grid


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype, casting="same_kind")


def _split(flat: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(counts)[:-1]) if len(counts) else []
