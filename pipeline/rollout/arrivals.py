"""Checks what engines answer, on arrival: an engine gone wrong must not teach the policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.rollout.engine import EngineError
from pipeline.types import GenerateRequest, Sample, SampleGroup


def checked(
    groups: Sequence[SampleGroup], requests: Sequence[GenerateRequest], vocabulary: int
) -> tuple[list[SampleGroup], Counter[str]]:
    """The groups with every faulty sample emptied and marked as aborted, and how many samples have which fault.

    Aborted samples are left out of training, rewards and metrics. Samples that are missing count as a fault too.

    Raises ``EngineError`` where groups do not belong to the requests: nobody could tell what was answered.
    """
    if [group.prompt.id for group in groups] != [request.prompt.id for request in requests]:
        raise EngineError(f"engines answered {len(requests)} requests with others' answers")
    faults: Counter[str] = Counter()
    kept = []
    for group, request in zip(groups, requests, strict=True):
        found = [_fault(sample, request, vocabulary) for sample in group.samples]
        faults.update(filter(None, found))
        faults["no answer"] += max(0, len(request.seeds) - len(found))
        if any(found):
            samples = (_emptied(s) if fault else s for s, fault in zip(group.samples, found, strict=True))
            group = replace(group, samples=tuple(samples))
        kept.append(group)
    return kept, +faults


def _fault(sample: Sample, request: GenerateRequest, vocabulary: int) -> str:
    """What is wrong with a sample; "" if nothing is."""
    tokens, count = sample.token_ids, len(sample.token_ids)
    if count != len(sample.log_probs):
        return "tokens and log-probs of different number"
    if sample.drawn_tokens > request.max_new_tokens:
        return "more tokens than allowed"
    if count and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        return "token ids beyond the vocabulary"
    return "" if np.isfinite(sample.log_probs).all() else "log-probs that are not finite"


def _emptied(sample: Sample) -> Sample:
    return replace(
        sample,
        token_ids=sample.token_ids[:0],
        log_probs=sample.log_probs[:0],
        drawn=None,
        turns=(),
        finish_reason="abort",
        weight_versions=(),
    )
