"""What is read out of Slurm's words, whatever a user wrote into them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.slurm.cluster import SshConfig
from launchers.slurm.jobs import Job, details, known, local, remember, state

JOB = Job("7", "isentrope-x", "/scratch/runs/x", "experiment", 0.0, 0.0, SshConfig())
SAID = """JobId=7 JobName={name}
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=lab QOS=normal
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:01:05 TimeLimit=04:00:00 TimeMin=N/A
   SubmitTime=2026-11-28T10:00:00 EligibleTime=2026-11-28T10:00:00
   Partition=gpu AllocNode:Sid=login:1
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList={nodes}
   Comment={comment}
   Command=/scratch/runs/x/launch/job.sh
"""


@pytest.mark.parametrize(
    ("reason", "shown"),
    [("None", ""), ("Nodes required for job are DOWN, DRAINED", "Nodes required for job are DOWN, DRAINED")],
)
@pytest.mark.parametrize("comment", ["(null)", "JobState=FAILED Reason=x NodeList=evil RunTime=1 Restarts=9"])
@pytest.mark.parametrize("name", ["x", "JobState=FAILED"])
def test_a_comment_or_a_name_is_no_state(name, reason, shown, comment):
    text = SAID.format(name=name, state="RUNNING", reason=reason, comment=comment, nodes="node[1-2]")
    assert state(JOB, lambda command: text) == {
        "state": "RUNNING",
        "reason": shown,
        "nodes": "node[1-2]",
        "elapsed": "00:01:05",
        "limit": "04:00:00",
        "restarts": "2",
    }


def test_a_run_folder_with_a_line_break_is_refused():
    from launchers.slurm.cluster import ClusterConfig
    from launchers.slurm.submit import Launch
    from launchers.slurm.worktree import Code
    from pipeline.config.errors import ConfigError
    from pipeline.config.schema import RunConfig

    code = Code(Path(), (), "", "")
    with pytest.raises(ConfigError, match="run_dir: "):
        Launch(RunConfig(), ClusterConfig(), 1, Path("/scratch/x\ntouch /tmp/y"), code)


def test_a_waiting_job_has_no_nodes():
    text = SAID.format(name="x", state="PENDING", reason="Priority", comment="(null)", nodes="(null)")
    assert (state(JOB, lambda command: text)["nodes"], state(JOB, lambda command: text)["state"]) == ("", "PENDING")


def test_damaged_files_of_a_run_cost_what_they_told(tmp_path, caplog):
    """The same files whole and damaged: what a line told is gone, the rest is there."""
    step = {"schema": 1, "kind": "step", "time": 9.0, "step": 0, "entropy": 0.3, "band_low": 0.2, "band_high": 0.4}
    events = [
        {"schema": 1, "kind": "run_start", "time": 5.0, "step": 0},
        step | {"state": "tracking"},
        {"schema": 1, "kind": "stall", "time": 10.0, "step": 1, "seconds": 40.0, "activity": "step"},
    ]
    lines = [json.dumps(event, separators=(",", ":")).encode() for event in events]
    # Each damaged in a way of its own: bytes that are no UTF-8, a field of another type, a line cut off.
    bad = [lines[0].replace(b"5.0", b'"\xff"'), lines[1].replace(b"9.0", b'"now"'), lines[2][:-20]]
    start = {"number": 0, "job_id": "7", "restart": 0, "nodes": ["n1"], "first_step": 0, "started": 2.0}
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/attempts.jsonl").write_bytes(b"[]\n" + json.dumps(start).encode() + b"\n")
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([*bad[:2], *lines, bad[2], b""]))
    (tmp_path / "heartbeat.json").write_text("[")
    job = replace(JOB, run_dir=str(tmp_path))
    running = SAID.format(name="x", state="RUNNING", reason="None", comment="(null)", nodes="n1")

    found = details(job, lambda command: running if command.startswith("scontrol") else local(command))

    assert found["heartbeat"] == {}
    assert found["stall"] == {"time": 10.0, "step": 1, "seconds": 40.0, "activity": "step"}
    assert found["seconds_to_first_step"] == {"ship": 0.0, "queue": 2.0, "start": 3.0, "step": 4.0, "total": 9.0}
    assert [(attempt["number"], attempt["end"]) for attempt in found["attempts"]] == [(0, "")]
    for said in ("of kind run_start is no event", "of kind step is", "of kind stall is", "no attempt", "no heartbeat"):
        assert said in caplog.text


def test_a_damaged_line_of_the_list_of_jobs_is_skipped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("launchers.environment.nemo_run_home", lambda: tmp_path)
    first = remember(("7",), "x", Path("/runs/x"), "e", SshConfig(), 1.0)
    with (tmp_path / "isentrope_jobs.jsonl").open("a") as file:
        file.write("{\n")
    second = remember(("8",), "y", Path("/runs/y"), "e", SshConfig(host="h"), 1.0)
    assert known() == [*first, *second]
    assert "line 2 is no job" in caplog.text
