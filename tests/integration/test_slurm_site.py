"""What a site may do to a run: reach it over SSH only, preempt it, keep accounts, run out of disk. The Slurm of ``test_slurm`` with more in it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.slurm_lab import PACKAGES, SlurmLab, missing
from tests.integration.test_slurm import RUN, STEPS, User, steps

MORE = ("sshd", "ssh-keygen", "rsync")
DATABASE = ("slurmdbd", "mariadbd", "mariadb-install-db")
PREEMPTION = """PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP"""

pytestmark = [
    pytest.mark.skipif(bool(missing(MORE)), reason=f"needs {missing(MORE)}; Debian packages: {', '.join(PACKAGES)}"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    more = {"partition": "PriorityTier=1 GraceTime=120", "conf": PREEMPTION, "accounting": not missing(DATABASE)}
    with SlurmLab(tmp_path_factory.mktemp("site") / "lab", **more) as running:
        yield running


@pytest.fixture(scope="module")
def user(lab, tmp_path_factory):
    return User(lab, tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def remote(lab, user, tmp_path_factory):
    """The same user on a laptop that has no Slurm, with a cluster file that names the login node."""
    return Remote(lab, user, tmp_path_factory.mktemp("remote"))


@pytest.fixture(autouse=True)
def _no_job_is_left(lab):
    yield
    lab.cancel_all()


class Remote:
    def __init__(self, lab: SlurmLab, user: User, root: Path) -> None:
        self.lab, self.user, self.root = lab, user, root
        self.home, self.models = root / "home", root / "models"
        self.home.mkdir()
        shutil.copytree(Path(__file__).parents[2] / "configs/model/pm4-100k", self.models / "a model")
        port, key = lab.start_sshd()
        lines = [line for line in user.cluster.read_text().splitlines() if not line.startswith("env")]
        lines.append("env: {OMP_NUM_THREADS: 1, PYTHONWARNINGS: ignore}")
        login = {"host": "127.0.0.1", "port": port, "user": "root", "identity": str(key), "job_dir": str(root / "jobs")}
        self.cluster = user.here / "remote.yaml"
        self.cluster.write_text("\n".join([*lines, f"ssh: {json.dumps(login)}"]))

    def isentrope(self, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "launchers.cli.main", *words]
        environment = self.user.environment | {"NEMORUN_HOME": str(self.home), "SLURM_CONF": "/nowhere/slurm.conf"}
        done = self.lab.run(command, check=False, cwd=self.user.here, env=environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done


def launch_words(remote: Remote, run_dir: Path, *more: str) -> list[str]:
    words = ["launch", "slurm", "--config", "quickstart.yaml", "--cluster", "remote.yaml", "--detach", *RUN]
    return [*words, "data.verifier=auto", f"model.hf_path='{remote.models}/a model'", f"run_dir='{run_dir}'", *more]


def test_a_run_is_submitted_over_ssh(remote, user):
    run_dir = user.scratch / "runs" / "over ssh"
    said = remote.isentrope(*launch_words(remote, run_dir)).stdout
    assert "versions: torch" in said
    job = re.search(r"submitted: job (\d+)", said)[1]
    user.end(job, "COMPLETED", run_dir=run_dir)
    assert [step["step"] for step in steps(run_dir)] == list(range(STEPS))
    status = json.loads(remote.isentrope("jobs", "status", job, "--json").stdout)
    assert (status["state"], status["step_events"]) == ("COMPLETED", STEPS)
    assert f"completed: {STEPS} steps" in remote.isentrope("jobs", "logs", job).stdout
