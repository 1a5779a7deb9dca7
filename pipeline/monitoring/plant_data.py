"""From a run's event log to the data of plant identification."""

from __future__ import annotations

import numpy as np

from pipeline.entropy.actuators import actuator_of
from pipeline.entropy.identify import IdentificationError, Record
from pipeline.monitoring.summary import RunHistory


def record_of(run: RunHistory) -> Record:
    """Entropies and commands of every step, in order. Raises ``IdentificationError`` for a run whose actuator never acted."""
    if run.is_baseline or all(event["actuator"] == "none" for event in run.steps):
        raise IdentificationError(
            f"{run.run_dir}: no actuator took part in this run, so it tells the drift but no gain: use --excite STEPS"
        )
    actuator = actuator_of(run.config.entropy)
    acted = [actuator.to_u(event["command"]) if event["positives"] > 0 else 0.0 for event in run.steps]
    return Record(np.array(run.column("entropy")), np.array(acted))
