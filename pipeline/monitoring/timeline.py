"""Tells of one step who was at work when: every engine, the learner, and the weight sync."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.clock import Span, StepClock, length

ENGINES = 16  # that have a lane of their own; the others count in the idle share alone
NEAR = 0.002  # of the step: work that pauses for less goes on
DIGITS = 4  # of a second

Lanes = Mapping[str, Sequence[Span]]


def timeline(clock: StepClock, engines: Sequence[Sequence[Span]], end: float) -> tuple[Lanes, dict[str, float]]:
    """The lanes of a step that ends at ``end`` (seconds of ``time.perf_counter``), and idle shares of its time.

    Lanes are ``learner``, ``sync``, ``engine 0``, ...: spans in seconds since the step's begin. Idle shares are of
    ``engines`` (in which they draw nothing) and of the ``learner`` (in which it neither trains nor sends weights).

    Args:
        engines: when each had requests. During a weight sync it holds them, and is not at work.
    """
    whole = [(clock.started, end)]
    train, sync = _common(clock.spans("train"), whole), _common(clock.spans("sync"), whole)
    drawing = [_without(_common(spans, whole), sync) for spans in engines]
    seconds = end - clock.started
    idle = {"learner": 1 - (length(train) + length(sync)) / seconds}
    if drawing:
        idle["engines"] = 1 - sum(map(length, drawing)) / len(drawing) / seconds
    lanes = {"learner": train, "sync": sync} | {f"engine {i}": spans for i, spans in enumerate(drawing[:ENGINES])}
    return {name: _plain(spans, clock.started, NEAR * seconds) for name, spans in lanes.items()}, idle


def timed(events: Iterable[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """What is drawn of ``step`` events: ``step``, ``began``, ``seconds``, ``idle``, ``lanes``. None gives nothing."""
    return [
        {
            "step": event["step"],
            "began": event["began"],
            "seconds": event["time"] - event["began"],
            "idle": event["idle"],
            "lanes": event["timeline"],
        }
        for event in events
        if event is not None and event.get("timeline")
    ]


def _common(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """What is within both; each side in order, without overlap."""
    cut = ((max(a, c), min(b, d)) for a, b in spans for c, d in others)
    return [(begin, end) for begin, end in cut if begin < end]


def _without(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """What of ``spans`` is outside ``others``."""
    edges = [-math.inf, *(edge for span in others for edge in span), math.inf]
    return sorted(_common(spans, list(zip(edges[::2], edges[1::2], strict=True))))


def _plain(spans: Sequence[Span], start: float, near: float) -> list[Span]:
    """Few and short numbers: spans from ``start`` on, those that nearly touch as one."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] <= near:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return [(round(begin - start, DIGITS), round(end - start, DIGITS)) for begin, end in joined]
