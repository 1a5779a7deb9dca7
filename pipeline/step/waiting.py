"""Samples that wait for a later step, or are being drawn for one, and the form in which a checkpoint keeps them.

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

from pipeline.types import (
    ControlDecision,
    Cuts,
    GenerateRequest,
    Prompt,
    Role,
    Sample,
    SampleGroup,
    StepSamples,
    Turn,
    WeightSpan,
)

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
    cached_tokens: int


class _GroupFields(TypedDict):
    prompt: Prompt
    role: Role
    samples: list[_SampleFields]


class _RequestFields(TypedDict):
    number: _Count
    prompt: Prompt
    seeds: tuple[int, ...]
    temperature: float
    max_new_tokens: int
    role: Role
    top_p: float
    cuts: Cuts | None
    begun: list[_SampleFields]


class _RestFields(TypedDict):
    rounds: _Count
    times_held: _Count
    numbers: list[_Count]
    requests: list[_RequestFields]


class _DrawnFields(TypedDict):
    """What JSON keeps of the samples of one step."""

    version: _Count
    decision: ControlDecision
    main: list[_GroupFields]
    auxiliary: list[_GroupFields]
    repeated: list[_GroupFields]
    stale: _Count
    step: _Count
    rest: _RestFields | None


@dataclass(frozen=True)
class Rest:
    """What of a step's samples is still being drawn, in the terms of ``pipeline.step.draw.Drawing``."""

    rounds: int
    times_held: int
    numbers: tuple[int, ...]  # of the groups that are there: main, auxiliary, repeated ones
    requests: Mapping[int, GenerateRequest]  # those left, with what was begun of them


@dataclass(frozen=True)
class Drawn:
    """Samples of one step, and what they were drawn with."""

    version: int  # of the weights that the step began with
    decision: ControlDecision  # in force at the time
    samples: StepSamples
    step: int = 0
    rest: Rest | None = None


def plain_of(waiting: Iterable[Drawn]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The fields that JSON keeps, one entry for each step, and the arrays over all of them."""
    waiting = list(waiting)
    samples = [sample for drawn in waiting for part in _parts(drawn) for sample in part]
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
    counted = sum(len(part) for drawn in fields for part in _parts_of(drawn))
    if counted != len(arrays["token_counts"]):
        raise ValueError(f"queue: {counted} samples wait, state.safetensors holds {len(arrays['token_counts'])}")
    samples = _samples(arrays)

    def part(small: list[_SampleFields], role: Role) -> tuple[Sample, ...]:
        return tuple(Sample(**next(samples), **each, role=role) for each in small)

    def group(state: _GroupFields) -> SampleGroup:
        return SampleGroup(state["prompt"], part(state["samples"], state["role"]), state["role"])

    def request(state: _RequestFields) -> GenerateRequest:
        return GenerateRequest(
            state["prompt"],
            state["seeds"],
            state["temperature"],
            state["max_new_tokens"],
            state["role"],
            state["top_p"],
            state["cuts"],
            part(state["begun"], state["role"]),
        )

    def rest(state: _RestFields) -> Rest:
        requests = {each["number"]: request(each) for each in state["requests"]}
        return Rest(state["rounds"], state["times_held"], tuple(state["numbers"]), requests)

    def step(state: _DrawnFields) -> Drawn:
        main, auxiliary, repeated = (
            [group(each) for each in part] for part in (state["main"], state["auxiliary"], state["repeated"])
        )
        return Drawn(
            state["version"],
            state["decision"],
            StepSamples(main, auxiliary, state["stale"], repeated),
            state["step"],
            state["rest"] and rest(state["rest"]),
        )

    return [step(state) for state in fields]


def _parts_of(drawn: _DrawnFields) -> Iterator[list[_SampleFields]]:
    """As ``_parts``."""
    for group in (*drawn["main"], *drawn["auxiliary"], *drawn["repeated"]):
        yield group["samples"]
    for request in drawn["rest"]["requests"] if drawn["rest"] else ():
        yield request["begun"]


def _fields(drawn: Drawn) -> dict[str, Any]:
    samples = drawn.samples
    return {
        "version": drawn.version,
        "decision": asdict(drawn.decision),
        "main": [_group_fields(group) for group in samples.main],
        "auxiliary": [_group_fields(group) for group in samples.auxiliary],
        "repeated": [_group_fields(group) for group in samples.repeated],
        "stale": samples.stale,
        "step": drawn.step,
        "rest": drawn.rest and _rest_fields(drawn.rest),
    }


def _rest_fields(rest: Rest) -> dict[str, Any]:
    requests = [
        {
            "number": number,
            "prompt": vars(request.prompt),
            "seeds": request.seeds,
            "temperature": request.temperature,
            "max_new_tokens": request.max_new_tokens,
            "role": str(request.role),
            "top_p": request.top_p,
            "cuts": request.cuts and vars(request.cuts),
            "begun": _small(request.begun),
        }
        for number, request in rest.requests.items()
    ]
    return {"rounds": rest.rounds, "times_held": rest.times_held, "numbers": rest.numbers, "requests": requests}


def _group_fields(group: SampleGroup) -> dict[str, Any]:
    return {"prompt": vars(group.prompt), "role": str(group.role), "samples": _small(group.samples)}


def _small(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    names = _SampleFields.__annotations__
    small = [{name: getattr(sample, name) for name in names} for sample in samples]
    for fields in small:
        fields["turns"] = [asdict(turn) for turn in fields["turns"]]
    return small


def _parts(drawn: Drawn) -> Iterator[Sequence[Sample]]:
    """In the order in which the fields and the arrays hold them."""
    for group in (*drawn.samples.main, *drawn.samples.auxiliary, *drawn.samples.repeated):
        yield group.samples
    for request in drawn.rest.requests.values() if drawn.rest else ():
        yield request.begun


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
