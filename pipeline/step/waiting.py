"""Samples that wait for a later step, and the form in which a checkpoint keeps them.

What grows with the tokens is kept in flat arrays over all samples, one sample behind the other, with the length of
each: ``token_ids`` int32, ``log_probs`` float32, ``text`` (UTF-8) uint8, ``weight_versions`` int64 [spans, 3] (version,
start, end), ``routes`` as samples have them; of samples that hold tokens nobody drew also ``drawn`` uint8. Prompts and
the small fields of samples are JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.types import ControlDecision, Prompt, Role, Sample, SampleGroup, StepSamples, Turn, WeightSpan

_Count = Annotated[int, Meta(ge=0)]


class _SampleFields(TypedDict):
    temperature: float
    seed: int
    finish_reason: str
    reward: float
    correct: bool
    verifier_error: str
    turns: tuple[Turn, ...]
    stop_reason: str


class _GroupFields(TypedDict):
    prompt: Prompt
    role: Role
    samples: list[_SampleFields]


class _DrawnFields(TypedDict):
    """What JSON keeps of the samples of one step."""

    version: _Count
    decision: ControlDecision
    main: list[_GroupFields]
    auxiliary: list[_GroupFields]
    repeated: list[_GroupFields]
    stale: _Count


@dataclass(frozen=True)
class Drawn:
    """Samples of one step, and what they were drawn with."""

    version: int  # of the weights
    decision: ControlDecision  # in force at the time
    samples: StepSamples


def plain_of(waiting: Iterable[Drawn]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The fields that JSON keeps, one entry for each step, and the arrays over all of them."""
    waiting = list(waiting)
    samples = [sample for drawn in waiting for group in _groups(drawn.samples) for sample in group.samples]
    texts = [sample.text.encode("utf-8", "surrogatepass") for sample in samples]
    routes = [sample.routes for sample in samples if sample.routes is not None]
    spans = [[(span.version, span.start, span.end) for span in sample.weight_versions] for sample in samples]
    masks = [np.empty(0, bool) if sample.drawn is None else sample.drawn for sample in samples]
    arrays = {
        "token_ids": _joined([sample.token_ids for sample in samples], np.int32),
        "log_probs": _joined([sample.log_probs for sample in samples], np.float32),
        "token_counts": np.array([len(sample.token_ids) for sample in samples], np.int64),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_bytes": np.array([len(text) for text in texts], np.int64),
        "weight_versions": np.array([span for of_sample in spans for span in of_sample], np.int64).reshape(-1, 3),
        "span_counts": np.array([len(of_sample) for of_sample in spans], np.int64),
        "drawn": _joined(masks, np.bool_).view(np.uint8),
        "drawn_counts": np.array([len(mask) for mask in masks], np.int64),
        "routes": np.concatenate(routes) if routes else np.empty(0, np.uint8),
        "route_counts": np.array([0 if s.routes is None else len(s.routes) for s in samples], np.int64),
    }
    return [_fields(drawn) for drawn in waiting], arrays


def drawn_of(plain: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> list[Drawn]:
    """What ``plain_of`` was given, bit for bit.

    Raises ``ValueError`` on other fields, and where the fields are not those of ``arrays``.
    """
    fields = msgspec.convert(plain, list[_DrawnFields])
    counted = sum(len(group["samples"]) for drawn in fields for group in _groups_of(drawn))
    if counted != len(arrays["token_counts"]):
        raise ValueError(f"queue: {counted} samples wait, state.safetensors holds {len(arrays['token_counts'])}")
    samples = _samples(arrays)

    def group(state: _GroupFields) -> SampleGroup:
        drawn = tuple(Sample(**next(samples), **small, role=state["role"]) for small in state["samples"])
        return SampleGroup(state["prompt"], drawn, state["role"])

    def step(state: _DrawnFields) -> Drawn:
        main, auxiliary, repeated = (
            [group(each) for each in part] for part in (state["main"], state["auxiliary"], state["repeated"])
        )
        return Drawn(
            state["version"],
            state["decision"],
            StepSamples(main, auxiliary, state["stale"], repeated),
        )

    return [step(state) for state in fields]


def _groups_of(drawn: _DrawnFields) -> list[_GroupFields]:
    return [*drawn["main"], *drawn["auxiliary"], *drawn["repeated"]]


def _fields(drawn: Drawn) -> dict[str, Any]:
    samples = drawn.samples
    return {
        "version": drawn.version,
        "decision": asdict(drawn.decision),
        "main": [_group_fields(group) for group in samples.main],
        "auxiliary": [_group_fields(group) for group in samples.auxiliary],
        "repeated": [_group_fields(group) for group in samples.repeated],
        "stale": samples.stale,
    }


def _group_fields(group: SampleGroup) -> dict[str, Any]:
    names = _SampleFields.__annotations__
    small = [{name: getattr(sample, name) for name in names} for sample in group.samples]
    for fields in small:
        fields["turns"] = [asdict(turn) for turn in fields["turns"]]
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
        _split(arrays["drawn"], arrays["drawn_counts"]),
        _split(arrays["routes"], arrays["route_counts"]),
    )
    for token_ids, log_probs, text, spans, mask, routes in zip(*columns, strict=True):
        yield {
            "token_ids": token_ids,
            "log_probs": log_probs,
            "text": text.tobytes().decode("utf-8", "surrogatepass"),
            "weight_versions": tuple(WeightSpan(version, start, end) for version, start, end in spans.tolist()),
            "drawn": mask.view(bool) if len(mask) else None,
            "routes": routes if len(routes) else None,
        }


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype, casting="same_kind")


def _split(flat: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(counts)[:-1]) if len(counts) else []
