"""Isentrope from Python: train, read a run as a table, evaluate, convert. These names and their meaning are kept.

``pandas.DataFrame(api.table(run))`` is a data frame; pandas itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import load_config
from pipeline.monitoring.events import FILE_NAME, read_events
from pipeline.monitoring.series import Series
from pipeline.monitoring.summary import summarize


def train(config: Path | str, *overrides: str, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Train as ``isentrope train --config CONFIG OVERRIDES`` does; returns the run's summary (``run_dir`` among it).

    Once ``stop_requested()`` is true the step in progress is ended and a checkpoint saved. Raises ``ConfigError`` and
    ``DataError`` before any work starts.
    """
    from launchers.run import assemble  # torch, Ray: only once the configuration is known to be good

    return assemble.train(load_config(Path(config), overrides), None, stop_requested)


def events(run: Path | str) -> list[dict[str, Any]]:
    """Every event in force of a run folder, in order; docs/events.md has the fields. Raises ``EventLogError``."""
    return read_events(Path(run) / FILE_NAME)


def table(run: Path | str) -> dict[str, np.ndarray]:
    """One column per figure, one row per step, also of a run that goes on: float64 [steps], NaN where there is none.

    Names are those of the sinks (docs/monitoring.md), e.g. ``entropy/mean``, ``reward/mean``; ``step`` is int64.
    Evaluations are in ``events``. Raises ``EventLogError``.
    """
    series = Series(Path(run))
    names = [name for name in series.names() if not name.startswith("evaluation/")]
    return {"step": np.arange(series.steps), **{name: series.column(name) for name in names}}


def summary(run: Path | str) -> dict[str, Any]:
    """The run in figures: time in band, final entropy, pass@k. Raises ``EventLogError`` and ``ConfigError``."""
    return summarize(Path(run))


def evaluate(run: Path | str, *overrides: str) -> dict[str, Any]:
    """pass@k and related figures of a run's newest checkpoint on its held-out prompts.

    ``overrides``: as on the command line, e.g. ``evaluation.samples=64``. Raises ``ConfigError`` and ``DataError``.
    """
    from launchers.run import assemble

    return assemble.evaluate(load_config(Path(run) / "config.yaml", overrides), Path(run))


def to_hugging_face(run: Path | str, out: Path | str) -> Path:
    """Write a run's newest checkpoint as a Hugging Face folder with config and tokenizer; returns ``out``.

    Raises ``ValueError`` where the run has no checkpoint or ``out`` holds something else.
    """
    from megatron_ext.weights import convert

    convert.megatron_to_hf(Path(run), convert.model_of(Path(run)), Path(out))
    return Path(out)
