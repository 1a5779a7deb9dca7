"""What the page shows of one run, as JSON documents."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import load_config
from pipeline.monitoring.events import FILE_NAME
from pipeline.monitoring.series import Series
from pipeline.monitoring.status import status
from pipeline.monitoring.web.law import fit_law

LAW_POINTS = 200  # means over as many stretches of the run: single steps' rewards are noise
DIGITS = 6  # of a number in a series; a screen shows three


class RunView:
    """One run folder, followed while it grows. Its methods may be called from several threads.

    Raises ``EventLogError`` (no or damaged events) and ``ConfigError`` (no or bad config.yaml).
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._config = load_config(run_dir / "config.yaml", check=False)
        self._series = Series(run_dir)
        self._lock = threading.Lock()
        self._size = -1
        self._status: dict[str, Any] = {}
        self.update()

    def update(self) -> bool:
        """Read what is new; whether anything was."""
        path = self.run_dir / FILE_NAME
        size = path.stat().st_size if path.is_file() else 0
        if size == self._size:
            return False
        with self._lock:
            self._series.update()
            self._status = status(self.run_dir)
            self._size = size
        return True

    def about(self) -> dict[str, Any]:
        """What does not change, and the status."""
        config = self._config
        controlled = config.entropy.controller != "none"
        return {
            "name": config.name,
            "folder": str(self.run_dir),
            "seed": config.seed,
            "steps": config.steps,
            "controller": config.entropy.controller,
            "actuator": config.entropy.actuator if controlled else "none",
            "pass_at": sorted(config.evaluation.k),
            "status": self.status(),
        }

    def status(self) -> dict[str, Any]:
        """The figures of ``pipeline.monitoring.status``."""
        return _finite(self._status)

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

    def law(self, first: int, last: int | None) -> dict[str, Any]:
        """Entropy and mean training reward of stretches of the run, and the law fitted to them."""
        with self._lock:
            found = self._series.read(["entropy/mean", "reward/mean"], first, last, LAW_POINTS)
        entropy, reward = found["entropy/mean"]["mean"], found["reward/mean"]["mean"]
        law = fit_law(entropy, reward)
        fit = None if law is None else {**asdict(law), "ceiling": law.ceiling}
        return {"entropy": _numbers(entropy), "reward": _numbers(reward), "fit": _finite(fit)}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
