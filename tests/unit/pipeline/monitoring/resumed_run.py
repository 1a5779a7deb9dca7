"""The log of a run that was killed after step 3 and resumed at step 2, written by the recorder itself, for the tests of
sinks.
"""

import sys
from pathlib import Path

from pipeline.checkpoints import Checkpoint
from pipeline.monitoring.events import EventReader

sys.path.append(str(Path(__file__).parent))
import run_writer as runs

FAULT = "engine 0 died and was started again"
NO_MORE = "monitoring.alerts.off=[fault]"  # that the fault raises
ALERT = {"step": 3, "rule": "exploding", "severity": "critical", "state": "begin", "reason": "lower the target"}


def first_attempt(run_dir, *overrides):
    recorder = runs.open_run(run_dir, NO_MORE, *overrides)
    recorder.evaluation(0, runs.evaluation(0.3, 0.9))
    for step in range(2):
        runs.record_step(recorder, step, 0.3)
    recorder.evaluation(2, runs.evaluation(0.4, 0.92))
    recorder.checkpoint(Checkpoint(2, run_dir / "checkpoints" / "step-2"))
    for step in (2, 3):
        runs.record_step(recorder, step, 0.5, metrics={"mismatch_kl": 0.001})
    recorder.event("alert", **ALERT)
    recorder.fault(FAULT)
    recorder._lock.close()  # as the end of a killed process would
    return run_dir


def second_attempt(run_dir, *overrides):
    recorder = runs.open_run(run_dir, NO_MORE, *overrides, resumed=True, step=2)
    for step in (2, 3):
        runs.record_step(recorder, step, 0.75)
    recorder.evaluation(4, runs.evaluation(0.5, 0.95))
    recorder.event("run_end", status="completed", error="")
    recorder._lock.close()
    return run_dir


def deliver(sink, run_dir, position=(0, 0)):
    """Everything from ``position`` on to ``sink``, which is closed twice; where the log ends."""
    reader = EventReader(run_dir / "events.jsonl", *position)
    for event in reader.poll():
        sink.event(event)
    sink.close()
    sink.close()
    return reader.offset, reader.lines
