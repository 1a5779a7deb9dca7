"""What a run says after its first step: where its entropy starts, where GRPO takes it, and how to choose a band."""

from __future__ import annotations

import math

from pipeline.monitoring.event_kinds import StepRecord

# Of ln H a step, under GRPO alone: the slowest and the fastest of the three tasks of docs/control.md (100k parameters).
DRIFT = (0.0036, 0.0094)


def start_note(record: StepRecord, schedule: str) -> str:
    """Three lines; ``record`` is the first step's, whose samples the untrained model drew.

    Two for a band that the run finds itself, ``schedule`` auto: its edges are a floor, and no band is to be chosen.
    """
    slow, fast = (round(math.log(2) / drift, -1) for drift in DRIFT)
    low, high = record.band_low, record.band_high
    start = record.controlled
    finds = schedule == "auto" and record.state != "off"
    if finds:
        band = f"the run finds its band itself, at {low:.3g} to {high:.3g} or above, by its evaluations"
    elif record.state != "off":
        place = "above" if start > high else "below" if start < low else "in"
        band = f"the run starts {place} its band, {low:.3g} to {high:.3g}"
    else:
        band = "nothing holds it (entropy.controller=none)"
    note = (
        f"entropy at the start: {start:.3g} nats per token on these data; {band}\n"
        f"GRPO alone lets it fall, by half within {fast:.0f} to {slow:.0f} steps on our small tasks; yours has its own "
        "pace"
    )
    if finds:
        return note
    return note + (
        "\na band at half of the start is a first guess: higher keeps more different answers, lower gains pass@1 "
        f"sooner (entropy.band.low={0.45 * start:.2g} entropy.band.high={0.55 * start:.2g}; docs/band.md); of a run "
        "without control `isentrope entropy target` reads a better one"
    )
