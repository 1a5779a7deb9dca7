"""An alert in the comment of a job on a real Slurm, sent from inside the job."""

import shlex
import sys
from pathlib import Path

import pytest

from tests.integration.slurm_lab import PACKAGES, SlurmLab, missing

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import time
from pathlib import Path
from pipeline.config.load import load_config
from pipeline.monitoring.sinks.alert_delivery import alert_sinks, delivery_problems
config = load_config(Path("quickstart.yaml"), ["monitoring.alerts.slurm_comment=true"])
assert not delivery_problems(config)
(build,) = alert_sinks(config, Path("/runs/pi")).values()
build().event(
    {"kind": "alert", "time": time.time(), "step": 7, "rule": "reward_drop", "severity": "critical", "state": "begin",
     "reason": "the mean reward is 60% of the best; it isn't \\"well\\""}
)
"""

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}; Debian packages: {', '.join(PACKAGES)}"),
    pytest.mark.timeout(300),
]


def test_squeue_and_scontrol_show_the_newest_alert(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    with SlurmLab(tmp_path / "lab", nodes=1) as lab:
        command = f"PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} {tmp_path}/job.py"
        job = lab.run(["sbatch", "--parsable", f"--output={tmp_path}/out", "--wrap", command]).stdout.strip()
        state = lab.wait(job, "COMPLETED", "FAILED")["JobState"]
        assert state == "COMPLETED", (tmp_path / "out").read_text()
        shown = lab.run(["scontrol", "show", "job", job]).stdout
    assert (
        "Comment=[critical] pi (/runs/pi), step 7: reward_drop: the mean reward is 60% of the best; it isn't" in shown
    )
