"""What is read out of Slurm's words, whatever a user wrote into them."""

from pathlib import Path

import pytest

from launchers.slurm.cluster import SshConfig
from launchers.slurm.jobs import Job, state

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
