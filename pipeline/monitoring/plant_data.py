"""Turns a run's event log into the data for identifying the plant: commands and the entropies that followed."""

from __future__ import annotations

import numpy as np

from pipeline.entropy.actuator import acting, actuator_of
from pipeline.entropy.identify import IdentificationError, Record
from pipeline.monitoring.summary import RunHistory


def record_of(run: RunHistory) -> Record:
    """Entropies and commands of every step, in order.

    Raises ``IdentificationError`` for a run whose actuator never acted.
    """
    if run.is_baseline or acting(run.config.entropy) is None:
        raise IdentificationError(
            f"{run.run_dir}: no actuator took part in this run, so it tells the drift but no gain: use --excite STEPS"
        )
    actuator = actuator_of(run.config.entropy)
    commands, positives = run.column("control/command"), run.column("control/positives")
    acted = [actuator.to_u(command) if used > 0 else 0.0 for command, used in zip(commands, positives, strict=True)]
    return Record(run.column(f"entropy/{'repeated' if _repeats(run) else 'mean'}"), np.array(acted))


def readings_of(run: RunHistory) -> str:
    """Which readings ``record_of`` takes, in words: repeated ones where there are any, since their noise is less."""
    return "the repeated prompts' readings" if _repeats(run) else "the step's own readings"


def _repeats(run: RunHistory) -> bool:
    return bool(np.isfinite(run.column("entropy/repeated")).any())
