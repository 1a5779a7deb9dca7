"""Runs submitted through nemo-run to a real two-node Slurm: completion, time limits, crashes, cancelling, refusals.

Nodes are network namespaces of this machine; the code is shipped as it is in the working tree.
"""

import json
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.forks import Done, Elsewhere
from tests.integration.slurm_lab import PACKAGES, SlurmLab, missing
from tests.processes import title
from tests.step_events import essence

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "dry_run.txt"
SECRET = secrets.token_hex(16)  # not a literal: the code travels with the job
STEPS = 10
NO_LIMIT = 10**6
ONE_NODE = ["learner.data_parallel_size=1", "rollout.engines=1", "cluster.nodes=1"]
RUN = [
    "learner.tensor_model_parallel_size=1",
    "learner.data_parallel_size=2",
    "rollout.engines=2",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "evaluation.every=0",
    "monitoring.progress=false",
    "data.verifier=lab_verifier:score",
    "data.verifier_timeout_s=900",
    f"steps={STEPS}",
]
# A run stands still while it has as many steps as ``User.hold`` said, so that a fault strikes where it is meant to.
VERIFIER = """
import json, time
from pathlib import Path

HOLD = Path(__file__).with_name("hold.json")

def held():
    events, limit = json.loads(HOLD.read_text())
    lines = Path(events).read_text().split("\\n")[:-1]
    steps = {event["step"] for event in map(json.loads, lines) if event["kind"] == "step"}
    return len(steps) >= limit

def score(prompt, response):
    while held():
        time.sleep(0.05)
    return float(len(response) % 3 == 0)
"""

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}; Debian packages: {', '.join(PACKAGES)}"),
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("slurm"),  # the cluster starts once, and so does the run that nobody interrupts
]
# Tests that are not compared with that run have a cluster of their own, beside it.
APART = pytest.mark.xdist_group("apart")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with SlurmLab(tmp_path_factory.mktemp("slurm") / "lab") as running:
        yield running


@pytest.fixture(scope="module")
def user(lab, tmp_path_factory):
    """Somebody who launches from a folder with a space in its name, to scratch space with one."""
    user = User(lab, tmp_path_factory.mktemp("user"))
    yield user
    user.close()


@pytest.fixture(autouse=True)
def _no_job_is_left(lab):
    yield
    lab.cancel_all()


class User:
    def __init__(self, lab: SlurmLab, root: Path) -> None:
        self.lab, self.root = lab, root
        self.home, self.scratch, self.here = root / "home", root / "my scratch", root / "some where"
        for folder in (self.home, self.scratch, self.here):
            folder.mkdir()
        (self.here / "lab_verifier.py").write_text(VERIFIER)
        self.cluster = self.here / "cluster.yaml"
        self.cluster.write_text(
            "account: acct\npartition: batch\nnodes: 2\ngpus_per_node: 0\ncpus_per_node: 2\nexclusive: false\n"
            f"scratch: {self.scratch}\npython: {sys.executable}\nobject_store_gib: 0.1\nsave_before_s: 60\n"
            'walltime: "01:00:00"\nsecrets: [LAB_TOKEN]\nenv: {OMP_NUM_THREADS: 1}\n'
        )
        self._elsewhere = Elsewhere(lab.command([]), self.here, self.environment)
        self.close = self._elsewhere.close

    @property
    def environment(self) -> dict[str, str]:
        own = {"NEMORUN_HOME": str(self.home), "PYTHONPATH": f"{ROOT}:{self.here}", "LAB_TOKEN": SECRET}
        return self.lab.environment | own | {"PYTHONWARNINGS": "ignore"}

    def isentrope(self, *words: str, code: int = 0) -> Done:
        done = self._elsewhere.isentrope(*words)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def run_dir(self, name: str | Path) -> Path:
        return self.scratch / "runs" / name

    def hold(self, run_dir: Path, steps: int = NO_LIMIT) -> None:
        """Let the run have so many steps, then stand still, with the next step's answers drawn and not judged."""
        written = self.here / "hold.new"
        written.write_text(json.dumps([str(run_dir / "events.jsonl"), steps]))
        written.replace(self.here / "hold.json")

    def launch(self, name: str | Path, *more: str, steps: int = NO_LIMIT) -> tuple[str, Path]:
        """Submit, and ``hold`` at ``steps``; job id and run folder."""
        run_dir = self.run_dir(name)
        self.hold(run_dir, steps)
        words = ["launch", "slurm", "--config", "quickstart.yaml", "--cluster", "cluster.yaml", "--detach"]
        done = self.isentrope(*words, *RUN, f"run_dir='{run_dir}'", *more)
        return submitted(done), run_dir

    def wait_for_steps(self, run_dir: Path, count: int, timeout: float = 800) -> None:
        deadline = time.monotonic() + timeout
        while len(steps(run_dir)) < count:
            assert time.monotonic() < deadline, self.log(run_dir)
            time.sleep(0.2)

    def go_on(self, run_dir: Path, count: int) -> None:
        """Let the run have ``count`` steps, and wait until it has."""
        self.hold(run_dir, count)
        self.wait_for_steps(run_dir, count)

    def wait_for_log(self, run_dir: Path, said: str, timeout: float = 400) -> None:
        deadline = time.monotonic() + timeout
        while said not in self.log(run_dir):
            assert time.monotonic() < deadline, self.log(run_dir)
            time.sleep(0.2)

    def end(self, job: str, *states: str, run_dir: Path, timeout: float = 800) -> None:
        """Wait for the job to end in one of ``states``."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        assert self.lab.wait(job, *over, timeout=timeout)["JobState"] in states, self.log(run_dir)

    def log(self, run_dir: Path) -> str:
        return "\n".join(path.read_text() for path in (run_dir / "launch").glob("*.out"))


def gone(processes: Callable[[], list[int]]) -> None:
    """Wait until none of them is left."""
    deadline = time.monotonic() + 60
    while left := processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def submitted(done: Done) -> str:
    """The job's id."""
    return re.search(r"submitted: job (\d+)", done.stdout)[1]


def steps(run_dir: Path) -> list[dict]:
    """Step events in force."""
    path = run_dir / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    found = {event["step"]: event for event in events if event["kind"] == "step"}
    return [essence(found[i]) for i in sorted(found)]


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "events.jsonl").read_text().split("\n")[:-1]
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def attempts(run_dir: Path) -> list[dict]:
    merged: dict[int, dict] = {}
    for line in (run_dir / "launch/attempts.jsonl").read_text().splitlines():
        entry = json.loads(line)
        merged.setdefault(entry["number"], {}).update(entry)
    return list(merged.values())


def state(run_dir: Path) -> bytes:
    """The learner's final weights and optimizer state, every byte."""
    (last,) = (run_dir / "checkpoints").glob(f"step-{STEPS:08d}")
    return b"".join(path.read_bytes() for path in sorted((last / "learner").glob("*.distcp")))


@pytest.fixture(scope="module")
def whole(user):
    """A run that nobody interrupts: DP 2 over two nodes."""
    job, run_dir = user.launch("whole")
    user.end(job, "COMPLETED", run_dir=run_dir)
    return job, run_dir


def test_a_run_over_two_nodes_completes(user, whole):
    job, run_dir = whole
    assert [step["step"] for step in steps(run_dir)] == list(range(STEPS))
    (only,) = attempts(run_dir)
    assert (only["end"], only["first_step"], only["last_step"], only["nodes"]) == ("completed", 0, STEPS, ["n[1-2]"])
    log = user.isentrope("jobs", "logs", job).stdout
    assert "nodes n1 n2" in log
    assert f"completed: {STEPS} steps" in log
    # Ranks and engines were on both nodes.
    assert max(step["metrics"]["mismatch_max"] for step in steps(run_dir)) < 1e-3
    status = json.loads(user.isentrope("jobs", "status", job, "--json").stdout)
    assert (status["state"], status["restarts"], status["step_events"]) == ("COMPLETED", "0", STEPS)
    *parts, total = status["seconds_to_first_step"].values()
    assert min(parts) > 0
    assert total == pytest.approx(sum(parts), abs=0.3)
    assert job in user.isentrope("jobs", "list").stdout


def test_the_code_is_recorded_as_commit_and_patch(whole):
    _, run_dir = whole
    record = json.loads((run_dir / "launch/code.json").read_text())
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record["commit"] == commit.stdout.strip()
    assert record["changed"] == bool((run_dir / "launch/code.patch").read_text())


def test_secrets_are_in_one_private_file_and_nowhere_else(user, whole):
    _, run_dir = whole
    private = run_dir / "launch/secrets.env"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert SECRET in private.read_text()
    everything = [path for folder in (user.home, user.scratch) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in everything if SECRET.encode() in path.read_bytes()] == [private]
    assert not list(run_dir.rglob("ray-token")), "the job's Ray token went with the job"


def test_a_run_cut_by_its_time_limit_ends_in_the_same_bits(user, whole):
    _, uncut = whole
    # Slurm counts in minutes. There is one left when it warns the run, or nearly two.
    job, run_dir = user.launch("cut", "cluster.save_before_s=110", steps=2)
    user.wait_for_steps(run_dir, 2)
    minutes, _ = map(int, user.lab.job(job)["RunTime"].split(":")[1:])
    user.lab.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}"])
    user.wait_for_log(run_dir, "the time limit is near: saving")
    user.hold(run_dir)
    user.lab.wait(job, "PENDING", timeout=400)
    user.lab.run(["scontrol", "update", f"JobId={job}", "TimeLimit=60"])
    user.end(job, "COMPLETED", run_dir=run_dir)
    first, second = attempts(run_dir)
    assert (first["end"], second["end"], second["last_step"]) == ("saved", "completed", STEPS), user.log(run_dir)
    assert first["last_step"] == second["first_step"] == 3, "the step in progress was finished"
    assert user.lab.job(job)["Restarts"] == "1"
    assert steps(run_dir) == steps(uncut)
    assert state(run_dir) == state(uncut)


@APART
def test_a_killed_rank_is_survived_and_a_cancelled_run_saves_and_is_resumed(user):
    """And ended at once by scancel."""
    lab = user.lab
    job, run_dir = user.launch("killed", "steps=500", "checkpoint.every=2", steps=3)
    user.wait_for_steps(run_dir, 3)
    beat = json.loads(user.isentrope("jobs", "status", job, "--json").stdout)["heartbeat"]
    assert beat["pid"] == int((run_dir / f"launch/job-{job}-0/driver.pid").read_text())
    assert beat["host"] == "n1"
    assert 0 <= beat["seconds_ago"] < 120
    (rank,) = lab.processes("n2", "ray::LearnerRank")
    os.kill(rank, signal.SIGKILL)
    user.go_on(run_dir, 4)
    killed, second = attempts(run_dir)
    assert killed["end"] == "again"
    assert "learner: its process died" in killed["reason"]
    assert (second["job_id"], second["restart"], second["first_step"]) == (job, 1, 3)
    assert "asked to save" in user.isentrope("jobs", "cancel", job).stdout
    user.wait_for_log(run_dir, "asked to stop: saving")
    user.hold(run_dir)
    user.end(job, "COMPLETED", run_dir=run_dir)
    cancelled = attempts(run_dir)[-1]
    assert (cancelled["end"], cancelled["last_step"]) == ("cancelled", 5), "the step in progress was finished"
    assert (run_dir / "checkpoints/step-00000005/manifest.json").is_file()

    user.hold(run_dir, 6)
    job = submitted(
        user.isentrope("launch", "slurm", "--resume", str(run_dir), "--cluster", "cluster.yaml", "--detach")
    )
    user.wait_for_steps(run_dir, 6)
    user.isentrope("jobs", "cancel", job, "--now")
    user.end(job, "CANCELLED", run_dir=run_dir)
    gone(lambda: [pid for node in lab.nodes for pid in lab.processes(node, "ray::")])
    assert not list(Path("/tmp").glob(f"isentrope-{job}-*")), "nor Ray's folder"
    assert [step["step"] for step in steps(run_dir)] == list(range(6))


def test_one_fault_after_the_other_costs_the_unfinished_steps_only(user, whole):
    """kill -9 of the driver, of an engine, of a raylet; a rank that stands still; a node without power: one run, an
    attempt each but for the engine.
    """
    _, undisturbed = whole
    lab = user.lab
    stall = ["monitoring.stall.min_seconds=20", "monitoring.stall.factor=20"]
    job, run_dir = user.launch("faults", "checkpoint.every=1", *stall, steps=2)

    user.wait_for_steps(run_dir, 2)
    os.kill(int((run_dir / f"launch/job-{job}-0/driver.pid").read_text()), signal.SIGKILL)
    user.go_on(run_dir, 3)
    os.kill(lab.processes("n2", "ray::EngineProcess")[0], signal.SIGKILL)
    user.go_on(run_dir, 5)  # the answers of the fourth step were drawn already
    (raylet,) = [pid for pid in lab.processes("n2") if "/raylet/raylet" in title(pid)]
    os.kill(raylet, signal.SIGKILL)
    gone(lambda: lab.processes("n2", "ray::"))
    user.go_on(run_dir, 8)  # of three steps the first, which is long, is not the median
    (rank,) = lab.processes("n2", "ray::LearnerRank")
    os.kill(rank, signal.SIGSTOP)
    user.go_on(run_dir, 9)
    assert rank not in lab.processes("n2"), "it does not stand beside the next attempt's"
    status = json.loads(user.isentrope("jobs", "status", job, "--json").stdout)
    lab.kill_node("n2")
    user.hold(run_dir)
    lab.wait(job, "PENDING", timeout=300)
    lab.start_node("n2")
    user.end(job, "COMPLETED", run_dir=run_dir)

    # Slurm may end the attempt after a node's failure, too: what it could not tell the node before, it tells it then.
    killed, unplugged, stalled, dark, *_, last = attempts(run_dir)
    assert [attempt["end"] for attempt in (killed, stalled, last)] == ["again", "again", "completed"]
    assert "SIGKILL" in killed["reason"]
    assert unplugged["reason"], "whoever noticed first that Ray was gone"
    assert dark["end"] in ("again", "lost"), "Ray noticed first, or Slurm"
    assert re.match(r"stalled: \d+ s in (step|checkpoint)\b.*; no answer from learner-1;", stalled["reason"])
    assert "was started again" in events(run_dir, "fault")[0]["description"]
    (event,) = events(run_dir, "stall")
    assert (event["action"], event["silent"], event["factor"]) == ("restart", ["learner-1"], 20)
    names = ["driver", "engine-0", "engine-1", "learner-0", "learner-1"]
    stacks = {Path(path).stem: (run_dir / path).read_text() for path in event["stacks"]}
    assert sorted(stacks) == names
    assert "pipeline/loop.py" in stacks["driver"]
    assert "on n1" in stacks["learner-0"]
    assert "LearnerRank" in stacks["learner-1"]
    assert "T (stopped)" in stacks["learner-1"]
    assert status["stall"]["silent"] == ["learner-1"]
    resumed = [event["step"] for event in events(run_dir, "resume")]
    begun = [attempt["first_step"] for attempt in attempts(run_dir)[1:]]
    assert begun[:3] == [2, 5, 8]
    assert {*begun[3:]} == {9}, "Slurm may have ended an attempt before it resumed"
    assert len(resumed) in (4, len(begun))
    assert {a - b for a, b in zip(begun, resumed, strict=False)} <= {0, 1}, "a step each at most"
    assert steps(run_dir) == steps(undisturbed)
    assert state(run_dir) == state(undisturbed)


@APART
def test_where_requeueing_is_forbidden_jobs_wait_in_a_chain(user):
    job, run_dir = user.launch("chain", "cluster.requeue=false", "cluster.chain=2", *ONE_NODE, "steps=2")
    first, second = (entry["job_id"] for entry in json.loads(user.isentrope("jobs", "list", "--json").stdout)[-2:])
    assert job == first
    for each in (first, second):
        user.end(each, "COMPLETED", run_dir=run_dir)
    assert len(attempts(run_dir)) == 1, "the second had nothing left to do"
    assert "all 2 steps were done already" in user.log(run_dir)


@APART
def test_a_local_launch_survives_a_driver_that_hangs(user):
    run_dir = user.run_dir("here")
    words = ["launch", "local", "--config", "quickstart.yaml", *RUN, f"run_dir='{run_dir}'", "checkpoint.every=1"]
    words += ["learner.data_parallel_size=1", "rollout.engines=1", "steps=3", "monitoring.stall.min_seconds=20"]
    user.hold(run_dir, 2)
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.cli.main", *words],
        cwd=user.here,
        env=user.environment,
        start_new_session=True,
    )
    user.wait_for_steps(run_dir, 2)
    os.kill(int((run_dir / "launch/driver.pid").read_text()), signal.SIGSTOP)
    user.hold(run_dir)
    assert process.wait(timeout=600) == 0
    hung, last = attempts(run_dir)
    assert [attempt["end"] for attempt in (hung, last)] == ["again", "completed"]
    stack = re.fullmatch(r"stalled: .* gave no sign of life for \d+ s; its stack: (.*)", hung["reason"])[1]
    assert "State:\tT (stopped)" in Path(stack).read_text()
    assert [step["step"] for step in steps(run_dir)] == list(range(3))


@APART
def test_a_crash_loop_stops_with_its_reason(user):
    broken = "cluster.env={OMP_NUM_THREADS: 1, GLOO_SOCKET_IFNAME: nowhere}"
    job, run_dir = user.launch("crash", "cluster.attempts_without_progress=2", broken, *ONE_NODE)
    user.end(job, "FAILED", run_dir=run_dir)
    assert [attempt["end"] for attempt in attempts(run_dir)] == ["again", "again"]
    assert "2 attempts in a row did not get beyond step 0:" in user.log(run_dir)
    assert "the training process ended with exit code 1" in user.log(run_dir)
    assert user.lab.job(job)["Restarts"] == "2"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["cluster.partition=nope"], ["cluster.partition: 'nope'", "nope not found", "remedy:"]),
        (["cluster.sbatch={qos: 5, begin: never}"], ["cluster.sbatch", "sbatch refused the job:", "remedy:"]),
        (["cluster.account=two words"], ["account: 'two words'", "remedy:"]),
        (["cluster.acount=x"], ["acount", "did you mean account?"]),
        (
            ["cluster.nodes=9", "learner.data_parallel_size=9", "rollout.engines=1"],
            ["cluster.nodes: 9", "has 2 nodes", "remedy:"],
        ),
        (["cluster.secrets=[LAB_ABSENT]"], ["secrets", "LAB_ABSENT", "export LAB_ABSENT=..."]),
        (["cluster.env={HF_TOKEN: abc}"], ["move HF_TOKEN to `secrets`"]),
        (["rollout.prompts_per_step=x"], ["rollout.prompts_per_step", "remedy:"]),
    ],
    ids=lambda value: value[0] if value[0].startswith(("cluster", "rollout")) else "",
)
def test_what_cannot_run_is_refused_before_it_is_queued(user, more, said):
    words = ["launch", "slurm", "--config", "quickstart.yaml", "--cluster", "cluster.yaml", "--detach", *RUN, *more]
    error = user.isentrope(*words, code=2).stderr
    assert all(word in error for word in said), error
    assert "Traceback" not in error
    assert user.lab.run(["squeue", "-h"]).stdout == ""


def test_a_cluster_file_without_an_account_is_refused(user):
    lines = user.cluster.read_text().splitlines()
    (user.here / "poor.yaml").write_text("\n".join(line for line in lines if not line.startswith("account")))
    words = ["launch", "slurm", "--config", "quickstart.yaml", "--cluster", "poor.yaml", *RUN]
    error = user.isentrope(*words, code=2).stderr
    assert "account: None" in error
    assert "a value is required" in error


def test_a_dry_run_prints_everything_and_submits_nothing(user):
    words = ["launch", "slurm", "--config", "quickstart.yaml", "--cluster", "cluster/pyxis.yaml", "--dry-run"]
    more = [
        "cluster.nodes=1",
        "cluster.gpus_per_node=2",
        "run_dir=/lustre/me/isentrope/runs/dry",
        "cluster.scratch=/lustre/me/isentrope",
    ]
    out = user.isentrope(*words, *more).stdout
    shown = re.sub(r"isentrope_\d{10,}", "isentrope_TIME", out.replace(str(user.home), "HOME"))
    shown = re.sub(r"code: .*", "code: CODE", re.sub(r"[\d.,]+ GiB free", "FREE", shown))
    shown = re.sub(r"--- config.yaml\n.*?\n\n---", "--- config.yaml\nCONFIG\n\n---", shown, flags=re.DOTALL)
    if not GOLDEN.exists():  # delete the file to write it anew
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(shown)
        pytest.fail(f"{GOLDEN} was written: look at it, then keep it")
    assert shown == GOLDEN.read_text()
    assert "prompts_per_step: 16" in out
    assert user.lab.run(["squeue", "-h"]).stdout == ""
    assert (
        subprocess.run(["bash", "-n"], input=shown.partition("job script\n")[2], text=True, check=False).returncode == 0
    )


def test_the_script_for_apptainer_and_a_chain(user):
    words = ["launch", "slurm", "--config", "quickstart.yaml", "--cluster", "cluster/apptainer.yaml", "--dry-run"]
    out = user.isentrope(*words, "--nodes", "1").stdout
    assert re.search(
        r"inside=\(apptainer exec --nv --bind /project/me/isentrope:\S+ --pwd \S+/code /project/\S+\.sif\)", out
    )
    assert "#SBATCH --dependency=singleton" in out
    assert "requeue=no" in out
