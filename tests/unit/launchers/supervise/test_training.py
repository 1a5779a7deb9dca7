"""What a supervisor makes of how a training process ended."""

import subprocess
from pathlib import Path

import pytest

from launchers.supervise import training
from launchers.supervise.attempts import Progress
from launchers.supervise.training import _verdict, train

QUICKSTART = Path(__file__).parents[4] / "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("code", "status", "error", "cancelled", "verdict", "said"),
    [
        (0, "completed", "", False, "completed", "7 steps"),
        (0, "completed", "", True, "completed", "7 steps"),  # it was done before it could be cancelled
        (0, "stopped", "", False, "saved", "checkpoint after 7 of 9 steps"),
        (0, "stopped", "", True, "cancelled", "checkpoint after 7 of 9 steps"),
        (2, "", "", False, "failed", "configuration, data or checkpoint were refused"),
        (1, "failed", "EngineError: gone", False, "again", "EngineError: gone"),
        (1, "", "", False, "again", "exit code 1"),
        (-9, "", "", False, "again", "SIGKILL"),
        (1, "failed", "stalled: 700 s in step", False, "again", "stalled: 700 s in step"),
        (-10, "", "", True, "cancelled", "before it could save: the training process ended with SIGUSR1"),
    ],
)
def test_verdicts(code, status, error, cancelled, verdict, said):
    found, reason = _verdict(code, Progress(7, status, error), 9, cancelled)
    assert found == verdict
    assert said in reason


def test_a_job_cancelled_while_ray_starts_starts_no_run(tmp_path):
    (tmp_path / "cancel").touch()
    assert train(tmp_path, tmp_path, tmp_path / "absent.yaml") == ("cancelled", "before the run was started")


def test_whoever_is_ended_ends_the_training_process(tmp_path, monkeypatch):
    """As by Slurm: a driver that waits for a Ray that is gone would keep the run from the next attempt."""
    started = []

    popen = subprocess.Popen

    def start(command, **options):
        started.append(popen(["sleep", "600"]))
        return started[-1]

    def ended(*arguments):
        raise SystemExit(143)

    monkeypatch.setattr(training.subprocess, "Popen", start)
    monkeypatch.setattr(training, "_watch", ended)
    with pytest.raises(SystemExit):
        train(tmp_path, tmp_path, QUICKSTART)
    assert started[0].poll() == -9
