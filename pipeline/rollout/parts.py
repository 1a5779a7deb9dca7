"""Responses that are drawn in parts: what is still to be drawn of them, and the parts put together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.model import routing
from pipeline.types import GenerateRequest, Sample, SampleGroup, WeightSpan


def remainder(request: GenerateRequest) -> GenerateRequest:
    """What an engine is asked: responses that are not finished, as far as ``pause_at``."""
    if not request.begun and request.pause_at is None:
        return request
    places = _unfinished(request)
    most = request.max_new_tokens if request.pause_at is None else min(request.pause_at, request.max_new_tokens)
    return replace(
        request,
        seeds=tuple(request.seeds[i] for i in places),
        begun=tuple(request.begun[i] for i in places) if request.begun else (),
        max_new_tokens=most,
        cuts=request.cuts and replace(request.cuts, samples=sum(i >= request.usual for i in places)),
        pause_at=None,
    )


def joined(request: GenerateRequest, group: SampleGroup) -> SampleGroup:
    """The group of ``request``, from what was begun and what an engine drew for its ``remainder``.

    What reached ``pause_at`` is held, with finish_reason "abort".
    """
    if not request.begun and request.pause_at is None:
        return group
    new = dict(zip(_unfinished(request), group.samples, strict=False))  # a lost sample is a fault, see ``arrivals``
    samples = dict(enumerate(request.begun))
    for place, sample in new.items():
        whole = _continued(samples[place], sample) if place in samples else sample
        paused = whole.finish_reason == "length" and len(whole.token_ids) < request.max_new_tokens
        samples[place] = replace(whole, finish_reason="abort") if paused else whole
    answered = [samples[i] for i in range(len(request.seeds)) if i in new or (i in samples and not samples[i].held)]
    return replace(group, samples=tuple(answered))


def _unfinished(request: GenerateRequest) -> list[int]:
    """Places of the responses that are yet to be drawn, or to go on."""
    return [i for i in range(len(request.seeds)) if not request.begun or request.begun[i].held]


def _continued(begun: Sample, new: Sample) -> Sample:
    """One response of two parts."""
    return replace(
        new,
        token_ids=np.concatenate([begun.token_ids, new.token_ids]),
        log_probs=np.concatenate([begun.log_probs, new.log_probs]),
        weight_versions=_spans(begun.weight_versions, new.weight_versions, len(begun.token_ids)),
        routes=routing.continued(begun.routes, new.routes),
    )


def _spans(begun: tuple[WeightSpan, ...], new: tuple[WeightSpan, ...], at: int) -> tuple[WeightSpan, ...]:
    """The spans of a response whose second part begins at token ``at``; neighbours of one version become one.

    A span without tokens says only which weights would have drawn: it stays where it is the only one.
    """
    moved = [WeightSpan(span.version, span.start + at, span.end + at) for span in new]
    spans: list[WeightSpan] = []
    for span in [each for each in (*begun, *moved) if each.end > each.start] or moved[-1:]:
        if spans and spans[-1].version == span.version:
            span = WeightSpan(span.version, spans.pop().start, span.end)
        spans.append(span)
    return tuple(spans)
