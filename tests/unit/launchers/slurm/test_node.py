"""What the first node of a job makes of an attempt that found no end."""

from launchers.slurm.node import _close_lost, _leave
from launchers.supervise.attempts import AttemptLog


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
