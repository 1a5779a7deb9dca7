"""Thirty SIGKILLs at random points of runs, inline and under Ray: every run ends like one undisturbed.

An attempt kills itself at its n-th operation on a file of the run's folder, or a few milliseconds after its n-th step.
So many kills meet a checkpoint half written, half published or half removed. A seed draws when. Attempts are forked
from a process that has imported everything, so that a start costs no import.
"""

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from launchers.supervise.attempts import begun
from pipeline.monitoring.events import read_events
from tests.integration.forks import FORKS
from tests.step_events import essence

ROOT = Path(__file__).resolve().parents[2]
INLINE = ["runtime=inline", "learner.tensor_model_parallel_size=1"]
SMALL = [
    "steps=8",
    "checkpoint.every=2",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "evaluation.every=3",
    "evaluation.prompts=8",
    "evaluation.samples=2",
    "evaluation.k=[1]",
    "monitoring.samples_per_step=4",
    "monitoring.progress=false",
]
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events of Python
RUNS = {  # name -> kills, options
    "ray, TP 2, two updates stale": (3, ["rollout.staleness=2"]),
    "on-policy": (9, [*INLINE]),
    "resample": (9, [*INLINE, "entropy.actuator=resample", "checkpoint.every=1", "checkpoint.keep_last=1"]),
    "two updates stale": (9, [*INLINE, "rollout.staleness=2", "entropy.actuator=resample"]),
}


@dataclass(frozen=True)
class Kill:
    """When an attempt ends itself."""

    operation: int | None  # at this operation on a file of the run, counted from 1
    step: int  # else: when the samples of so many steps have been written,
    milliseconds: float  # and so much later

    @classmethod
    def drawn(cls, rng: Random) -> "Kill":
        """At a file operation as often as at a step."""
        return cls(rng.choice((None, rng.randint(1, 70))), rng.randint(1, 3), rng.uniform(0, 60))


def attempt(run_dir: str, words: list[str], kill: Kill | None) -> None:
    """``isentrope`` in this process, whose output goes to a file; ``kill`` ends it with SIGKILL."""
    with Path(f"{run_dir}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if kill is not None:
        sys.addaudithook(Countdown(run_dir, kill))
    from launchers.cli.main import run

    run(words)


class Countdown:
    """The audit hook that ends its process."""

    def __init__(self, run_dir: str, kill: Kill) -> None:
        self._run_dir, self._kill = run_dir, kill
        self._operations = self._steps = 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(self._run_dir + "/"):
            return
        self._operations += 1
        if self._operations == self._kill.operation:
            end()
        if event == "open" and "/samples/" in str(arguments[0]):
            self._steps += 1
            if self._kill.operation is None and self._steps == self._kill.step:
                threading.Timer(self._kill.milliseconds / 1000, end).start()


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_attempt(run_dir: Path, options: list[str], kill: Kill | None) -> int:
    """Its exit code; -9 where it was killed."""
    new = ["--config", str(ROOT / "configs/quickstart.yaml"), f"run_dir={run_dir}", *SMALL, *options]
    words = ["train", *(["--resume", str(run_dir)] if begun(run_dir) else new)]
    process = FORKS.Process(target=attempt, args=(str(run_dir), words, kill))
    process.start()
    process.join()
    return process.exitcode


def kept(run_dir: Path) -> dict:
    """What must be there in the end, and be the same."""
    events = read_events(run_dir / "events.jsonl")
    return {
        "steps": [essence(event) for event in events if event["kind"] == "step"],
        "evaluations": [
            {key: value for key, value in event.items() if key not in ("time", "seconds")}
            for event in events
            if event["kind"] == "evaluation"
        ],
        "saved": [event["step"] for event in events if event["kind"] == "checkpoint"],
        "checkpoints": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
        "samples": {path.name: path.read_text() for path in (run_dir / "samples").iterdir()},
        "end": events[-1]["status"],
    }


def log_of(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text()[-2000:]


@pytest.mark.parametrize("name", RUNS)
def test_random_kills_change_nothing(tmp_path, name):
    """Runs that are killed and resumed until they are complete, against one undisturbed."""
    wanted, options = RUNS[name]
    assert run_attempt(tmp_path / "whole", options, None) == 0, log_of(tmp_path / "whole")
    undisturbed = kept(tmp_path / "whole")
    rng, met = Random(name), []
    while len(met) < wanted:
        run_dir, codes = tmp_path / f"killed-{len(met)}", [-signal.SIGKILL]
        while codes[-1] == -signal.SIGKILL:
            kill = Kill.drawn(rng) if len(met) < wanted else None
            codes.append(run_attempt(run_dir, options, kill))
            met += [kill] if codes[-1] == -signal.SIGKILL else []
        assert codes[-1] == 0, f"{name}, after {met}: {log_of(run_dir)}"
        mine = kept(run_dir)
        for what, value in undisturbed.items():
            assert mine[what] == value, f"{name}, after {met}: {what}"
