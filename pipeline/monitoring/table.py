"""Writes the steps of runs as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.disk import replacing
from pipeline.monitoring.metrics import scalars
from pipeline.monitoring.series import OFFSET, STATE, TIME
from pipeline.monitoring.summary import RunHistory

BLOCK = 4096  # steps held in memory at a time


def write_csv(runs: Sequence[RunHistory], path: Path) -> None:
    """One row per step and run.

    Columns: ``run``, ``seed``, ``step``, ``time``, ``state``, then every figure by its name in ``metrics.py``.

    A figure that a step does not have is empty. An evaluation stands in the row of the last step before it. The file
    appears when it is complete; memory does not grow with the runs.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.series.names()))
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seed", "step", "time", "state", *names])
        for run in runs:
            writer.writerows(_rows(run, names))


def _rows(run: RunHistory, names: Sequence[str]) -> Iterator[list[Any]]:
    states = run.series.states()
    evaluated = {event["step"] - 1: scalars(event) for event in run.evaluations}
    for first in range(0, run.steps, BLOCK):
        last = min(first + BLOCK, run.steps) - 1
        columns = [run.series.column(name, first, last) for name in (OFFSET, TIME, STATE, *names)]
        for step, (offset, time, state, *values) in enumerate(np.stack(columns, axis=1).tolist(), start=first):
            if offset == offset:  # not NaN: the log has this step
                found = evaluated.get(step, {})
                cells = [_cell(found.get(name, value)) for name, value in zip(names, values, strict=True)]
                yield [run.title, run.config.seed, step, time, states[int(state)], *cells]


def _cell(value: float) -> Any:
    return "" if value != value else value
