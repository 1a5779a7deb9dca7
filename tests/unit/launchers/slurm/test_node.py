"""What the first node of a job makes of an attempt that found no end."""

from launchers.slurm.node import _close_lost, _leave
from launchers.supervise.attempts import AttemptLog


def test_a_lost_attempt_is_closed_with_what_its_nodes_left(tmp_path):
    log = AttemptLog(tmp_path)
    log.start("12", 3, ["n[1-2]"], 0)
    left = tmp_path / "launch/job-12-3"
    left.mkdir()
    _leave(left, "again", "Ray ended by itself\non n2")
    _close_lost(log, tmp_path, 4, False)
    _close_lost(log, tmp_path, 9, True)  # once
    (only,) = log.read()
    assert (only.end, only.last_step, only.reason) == ("lost", 4, "Ray ended by itself on n2")


def test_a_lost_attempt_may_leave_nothing(tmp_path):
    log = AttemptLog(tmp_path)
    _close_lost(log, tmp_path, 0, False)
    assert log.read() == []
    log.start("12", 0, ["n1"], 0)
    _close_lost(log, tmp_path, 0, False)
    assert "node failure, kill or time limit" in log.read()[0].reason


def test_an_attempt_that_was_ended_after_its_last_step_has_completed_the_run(tmp_path):
    """As by Slurm, which tells a node that was dark what it had missed."""
    log = AttemptLog(tmp_path)
    log.start("12", 1, ["n[1-2]"], 6)
    _close_lost(log, tmp_path, 10, True)
    (only,) = log.read()
    assert (only.end, only.last_step) == ("completed", 10)
