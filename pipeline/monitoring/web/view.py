"""Makes the JSON documents of one run for the web page."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.entropy.reward_law import BLOCKS, fit_reward_law
from pipeline.monitoring.metrics import none_if_not_finite
from pipeline.monitoring.series import Series
from pipeline.monitoring.status import status_of
from pipeline.monitoring.timeline import timed

JUDGE_S = 10.0  # until a run that appends nothing is looked at again: it may have to be called silent
DIGITS = 6  # of a number in a series; a screen shows three
TIMED = 12  # steps of a timeline


class RunView:
    """One run folder, followed while it grows. Its methods may be called from several threads.

    Raises ``EventLogError`` where there is no readable run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._series = Series(run_dir)
        self._lock = threading.Lock()
        self._judge()

    def update(self) -> bool:
        """Read what is new; whether there is news, a run that fell silent among it. Raises ``EventLogError``."""
        with self._lock:
            before = self._status["status"]
            grew = self._series.update()
            if grew or time.monotonic() - self._judged > JUDGE_S:
                self._judge()
            return grew or self._status["status"] != before

    def _judge(self) -> None:
        self._status, self._judged = status_of(self._series), time.monotonic()

    def status(self) -> dict[str, Any]:
        """The figures of ``pipeline.monitoring.status``."""
        return self._status

    def read(
        self, names: Sequence[str], spread: Sequence[str], first: int, last: int | None, points: int
    ) -> dict[str, Any]:
        """``{"step": [...], name: {"mean": [...]}}`` of at most ``points`` points, null where there is no number.

        Names in ``spread`` also have ``low`` and ``high``: the extremes of the steps that a point stands for.
        """
        with self._lock:
            found = self._series.read([*names, *spread], first, last, points)
        document: dict[str, Any] = {"step": [int(step) for step in found["step"]]}
        for name in (*names, *spread):
            kinds = ("mean", "low", "high") if name in spread else ("mean",)
            document[name] = {kind: _numbers(found[name][kind]) for kind in kinds}
        return document

    def marks(self) -> list[dict[str, Any]]:
        """Alerts, restarts, faults, checkpoints and evaluations: step, kind, text, severity."""
        with self._lock:
            return self._series.marks()

    def timeline(self, first: int, last: int | None) -> list[dict[str, Any]]:
        """Who was at work when, in the last few of these steps.

        Dicts with ``step``, ``began`` (Unix seconds), ``seconds``, ``idle`` (shares) and ``lanes``, {name: [[begin,
        end], ...]} in seconds since the step began.
        """
        with self._lock:
            last = self._series.steps - 1 if last is None else min(last, self._series.steps - 1)
            return timed(self._series.event(step) for step in range(max(first, last - TIMED + 1), last + 1))

    def law(self, first: int, last: int | None) -> dict[str, Any]:
        """Mean entropy and training reward of stretches of the run, and the law fitted to it (null: too few steps)."""
        names = ("entropy/mean", "reward/mean")
        with self._lock:
            stretches = self._series.read(names, first, last, BLOCKS)
            entropy, reward = (self._series.column(name, first, last) for name in names)
        try:
            fit = {
                name: none_if_not_finite(value)
                for name, value in asdict(fit_reward_law(entropy.tolist(), reward.tolist())).items()
            }
        except ValueError:
            fit = None
        drawn = {name: _numbers(stretches[name]["mean"]) for name in names}
        return {"entropy": drawn["entropy/mean"], "reward": drawn["reward/mean"], "fit": fit}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
