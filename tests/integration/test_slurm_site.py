"""What a site may do to a run: reach it over SSH only, preempt it, keep accounts, run out of disk.

The Slurm of ``test_slurm`` with more in it.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.forks import Done, Elsewhere
from tests.integration.slurm_lab import PACKAGES, SlurmLab, missing
from tests.integration.test_slurm import ONE_NODE, ROOT, User, attempts, steps, submitted

MORE = ("sshd", "ssh-keygen", "rsync")
DATABASE = ("slurmdbd", "mariadbd", "mariadb-install-db")
SHORT = [*ONE_NODE, "steps=3"]
PREEMPTION = """PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP"""

SMALL = "24m"  # of the disk that fills up

pytestmark = [
    pytest.mark.skipif(bool(missing(MORE)), reason=f"needs {missing(MORE)}; Debian packages: {', '.join(PACKAGES)}"),
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("site"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small disk, mounted before the nodes start, which see what is mounted then."""
    folder = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def lab(small, tmp_path_factory):
    more = {"partition": "PriorityTier=1 GraceTime=300", "conf": PREEMPTION, "accounting": not missing(DATABASE)}
    with SlurmLab(tmp_path_factory.mktemp("site") / "lab", **more) as running:
        yield running


@pytest.fixture(scope="module")
def user(lab, tmp_path_factory):
    user = User(lab, tmp_path_factory.mktemp("user"))
    yield user
    user.close()


@pytest.fixture(scope="module")
def remote(lab, user, tmp_path_factory):
    """The same user on a laptop that has no Slurm, with a cluster file that names the login node."""
    remote = Remote(lab, user, tmp_path_factory.mktemp("remote"))
    yield remote
    remote.close()


@pytest.fixture(autouse=True)
def _no_job_is_left(lab):
    yield
    lab.cancel_all()


class Remote:
    """A laptop: the cluster's folders and Slurm's configuration are not there."""

    def __init__(self, lab: SlurmLab, user: User, root: Path) -> None:
        self.lab, self.user = lab, user
        self.home, self.site = root / "home", root / "site"
        self.home.mkdir()
        shutil.copytree(ROOT / "configs/model/pm4-100k", self.site / "a model")
        port, key = lab.start_sshd()
        lines = [line for line in user.cluster.read_text().splitlines() if not line.startswith(("env", "secrets"))]
        lines.append("env: {OMP_NUM_THREADS: 1, PYTHONWARNINGS: ignore}")
        login = {"host": "127.0.0.1", "port": port, "user": "root", "identity": str(key), "job_dir": str(root / "jobs")}
        self.cluster = user.here / "remote.yaml"
        self.cluster.write_text("\n".join([*lines, f"ssh: {json.dumps(login)}"]))
        hide = f'mount -t tmpfs tmpfs "{self.site}"; mount -t tmpfs tmpfs "{user.scratch}"; exec "$@"'
        enter = lab.command(["unshare", "--mount", "sh", "-c", hide, "sh"])
        variables = user.environment | {"NEMORUN_HOME": str(self.home), "SLURM_CONF": "/nowhere/slurm.conf"}
        self._elsewhere = Elsewhere(enter, user.here, variables)
        self.close = self._elsewhere.close

    def isentrope(self, *words: str, code: int = 0) -> Done:
        done = self._elsewhere.isentrope(*words)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def launch(self, run_dir: Path, *more: str, code: int = 0) -> Done:
        words = ["launch", "slurm", "--config", "quickstart.yaml", "--cluster", "remote.yaml", "--detach", *SHORT]
        own = [f"model.hf_path='{self.site}/a model'", "data.verifier=auto", f"run_dir='{run_dir}'"]
        return self.isentrope(*words, *own, *more, code=code)


def test_a_run_is_submitted_and_resumed_over_ssh(remote, user):
    run_dir = user.scratch / "runs" / "over ssh"
    done = remote.launch(run_dir)
    assert "versions: torch" in done.stdout
    assert "code: commit" in done.stdout
    job = submitted(done)
    user.end(job, "COMPLETED", run_dir=run_dir)
    status = json.loads(remote.isentrope("jobs", "status", job, "--json").stdout)
    assert (status["state"], status["step_events"]) == ("COMPLETED", 3)
    assert "completed: 3 steps" in remote.isentrope("jobs", "logs", job).stdout
    words = ["launch", "slurm", "--resume", str(run_dir), "--cluster", "remote.yaml", "steps=5", "cluster.nodes=1"]
    assert "COMPLETED" in remote.isentrope(*words).stderr, "it is followed to its end"
    assert [step["step"] for step in steps(run_dir)] == list(range(5))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.hf_path=/nowhere/model"], ["model.hf_path: '/nowhere/model'", "has no config.json", "remedy:"]),
        (
            [
                *("data.source.kind=jsonl", "data.source.path=/nowhere/a.jsonl"),
                *("cluster.scratch=/nowhere/scratch", "cluster.python=/nowhere/python"),
            ],
            [
                *("data.source.path: '/nowhere/a.jsonl'", "no such file on 127.0.0.1", "copy the data there"),
                *("cluster.scratch", "no such folder on 127.0.0.1", "make it"),
                *("cluster.python", "no such program on 127.0.0.1", "install it there"),
            ],
        ),
        (["cluster.python=/usr/bin/python3"], ["cluster.python: '/usr/bin/python3'", "problem:", "install"]),
        (["cluster.ssh.port=2"], ["cluster.ssh.host: 'root@127.0.0.1'", "try `ssh root@127.0.0.1`"]),
        (["cluster.ssh.user=nobody"], ["cluster.ssh.host: 'nobody@127.0.0.1'", "the login was refused", "try `ssh"]),
    ],
    ids=["model", "paths", "packages", "port", "login"],
)
def test_what_is_not_there_is_said_before_anything_is_sent(remote, user, more, said):
    error = remote.launch(user.scratch / "runs" / "refused", *more, code=2).stderr
    assert all(word in error for word in said), error
    assert "Traceback" not in error
    assert not (user.scratch / "runs/refused").exists()
    assert user.lab.run(["squeue", "-h"]).stdout == ""


def test_a_preempted_run_saves_where_it_is_warned_and_goes_on_where_it_is_not(user):
    def take_nodes(grace: int) -> str:
        user.lab.run(["scontrol", "update", "PartitionName=batch", f"GraceTime={grace}"])
        words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        return user.lab.run(["sbatch", "--parsable", *words]).stdout.strip()

    job, run_dir = user.launch("preempted", *SHORT, "steps=6", "checkpoint.every=2", steps=2)
    user.wait_for_steps(run_dir, 2)
    urgent = take_nodes(300)
    user.wait_for_log(run_dir, ": saving")
    user.go_on(run_dir, 4)
    user.lab.wait(urgent, "COMPLETED")
    user.lab.wait(take_nodes(0), "COMPLETED", timeout=600)
    user.hold(run_dir)
    user.end(job, "COMPLETED", run_dir=run_dir)
    saved, lost, last = attempts(run_dir)
    assert (saved["end"], last["end"]) == ("saved", "completed"), user.log(run_dir)
    assert lost["end"] in ("lost", "again")
    assert lost["first_step"] == saved["last_step"] == 3, "nothing of the first is repeated"
    assert user.lab.job(job)["Restarts"] == "2"
    assert [step["step"] for step in steps(run_dir)] == list(range(6))


def test_a_disk_that_fills_up_loses_nothing(user, small):
    job, run_dir = user.launch(small / "run", *SHORT, "checkpoint.every=2", "steps=6", steps=3)
    user.wait_for_steps(run_dir, 3)
    free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
    (small / "ballast").write_bytes(bytes(free - 500_000))
    user.hold(run_dir)
    user.end(job, "FAILED", run_dir=run_dir)
    (only,) = attempts(run_dir)
    words = (
        rf"DiskFullError: {run_dir}/checkpoints: no space left: a checkpoint after step 4 needs about [\d,]+ bytes, "
        r"[\d,]+ bytes are free"
    )
    assert re.match(words, only["reason"])
    assert re.search(f"failed, and will not be tried again: {words}", user.log(run_dir).splitlines()[-1])
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["kind"], events[-1]["status"]) == ("run_end", "failed")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000002"]
    (small / "ballast").unlink()
    words = ["launch", "slurm", "--resume", str(run_dir), "--cluster", "cluster.yaml", "cluster.nodes=1", "--detach"]
    job = submitted(user.isentrope(*words))
    user.end(job, "COMPLETED", run_dir=run_dir)
    assert [step["step"] for step in steps(run_dir)] == list(range(6))


@pytest.mark.skipif(
    bool(missing(DATABASE)), reason=f"needs {missing(DATABASE)}; Debian packages: slurmdbd, mariadb-server"
)
def test_jobs_that_slurm_has_forgotten_are_read_from_its_accounts(user):
    job, run_dir = user.launch("accounted", *SHORT, "steps=1")
    user.end(job, "COMPLETED", run_dir=run_dir)
    other, other_dir = user.launch("cancelled", "cluster.sbatch={begin: now+1hour}")
    user.isentrope("jobs", "cancel", other)
    user.end(other, "CANCELLED", run_dir=other_dir)
    user.lab.forget_jobs()
    listed = {entry["job_id"]: entry["state"] for entry in json.loads(user.isentrope("jobs", "list", "--json").stdout)}
    assert (listed[job], listed[other]) == ("COMPLETED", "CANCELLED")
    status = json.loads(user.isentrope("jobs", "status", job, "--json").stdout)
    assert (status["state"], status["nodes"], status["limit"]) == ("COMPLETED", "n1", "01:00:00")
    assert re.fullmatch(r"00:\d\d:\d\d", status["elapsed"])
