"""What the first node of a job makes of how training ended, and of an attempt that found no end."""

import pytest

from launchers import environment
from launchers.run import ray_cluster
from launchers.slurm.node import _close_lost, _leave, _verdict, train
from launchers.supervise.attempts import AttemptLog, Progress


@pytest.mark.parametrize(
    ("code", "status", "error", "cancelled", "verdict", "said"),
    [
        (0, "completed", "", False, "completed", "7 steps"),
        (0, "completed", "", True, "completed", "7 steps"),  # it was done before it could be cancelled
        (0, "stopped", "", False, "saved", "checkpoint after 7 of 9 steps"),
        (0, "stopped", "", True, "cancelled", "checkpoint after 7 of 9 steps"),
        (2, "", "", False, "failed", "configuration was refused"),
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


def test_a_lost_attempt_is_closed_with_what_its_nodes_left(tmp_path):
    log = AttemptLog(tmp_path)
    log.start("12", 3, ["n[1-2]"], 0)
    left = tmp_path / "launch/job-12-3"
    left.mkdir()
    _leave(left, "again", "Ray ended by itself\non n2")
    _close_lost(log, tmp_path, 4)
    _close_lost(log, tmp_path, 9)  # once
    (only,) = log.read()
    assert (only.end, only.last_step, only.reason) == ("lost", 4, "Ray ended by itself on n2")


def test_a_lost_attempt_may_leave_nothing(tmp_path):
    log = AttemptLog(tmp_path)
    _close_lost(log, tmp_path, 0)
    assert log.read() == []
    log.start("12", 0, ["n1"], 0)
    _close_lost(log, tmp_path, 0)
    assert "node failure, kill or time limit" in log.read()[0].reason


def test_gloo_is_told_the_interface_of_an_address(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "so that it is restored")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    ray_cluster.use_interface_of("127.0.0.1")
    assert environment.values(["GLOO_SOCKET_IFNAME"]) == {"GLOO_SOCKET_IFNAME": "lo"}


def test_the_own_address_is_that_of_the_route_to_the_peer():
    assert environment.own_address("127.0.0.1") == "127.0.0.1"


def test_processes_per_node():
    assert ray_cluster.most_on_one_node(["a", "b", "b", "a", "b"]) == 3
