"""One sink cannot disturb another, nothing is delivered twice, and the process ends when it should."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.monitoring import deliver
from pipeline.monitoring.deliver import Follower, behind, read_position

sys.path.append(str(Path(__file__).parent))
import resumed_run
import run_writer as runs

KINDS = ["run_start", "evaluation", "step", "step", "evaluation", "checkpoint", "step", "step", "alert", "fault"]


class Collect:
    """Keeps what it is told; fails as ``fail`` says, by the number of the try."""

    def __init__(self, fail=lambda number, event: None):
        self.events, self.closed, self.tries, self.fail = [], 0, 0, fail

    def event(self, event):
        self.tries += 1
        error = self.fail(self.tries, event)
        if error:
            raise error
        self.events.append(event)

    def close(self):
        self.closed += 1


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(deliver, "FIRST_WAIT_S", 0.001)
    (tmp_path / "sinks").mkdir()
    return resumed_run.first_attempt(tmp_path)


def follow(run_dir, *sinks, over=True):
    event = threading.Event()
    if over:
        event.set()
    followers = [Follower(f"sink{i}", lambda sink=sink: sink, run_dir, event) for i, sink in enumerate(sinks)]
    for follower in followers:
        follower.start()
    return followers, event


def finish(run_dir, *sinks):
    for follower in follow(run_dir, *sinks)[0]:
        follower.join()


def test_every_event_once_in_order_and_from_there_on_after_a_restart(run_dir):
    first, second = Collect(), Collect()
    finish(run_dir, first)
    assert [event["kind"] for event in first.events] == KINDS
    assert first.closed == 1
    assert read_position(run_dir / "sinks" / "sink0.json") == ((run_dir / "events.jsonl").stat().st_size, len(KINDS))
    assert behind(run_dir, ["sink0", "sink1"]) == ["sink1"]
    resumed_run.second_attempt(run_dir)
    assert behind(run_dir, ["sink0"]) == ["sink0"]
    finish(run_dir, second)
    assert [event["kind"] for event in second.events] == ["resume", "step", "step", "evaluation", "run_end"]


def test_what_a_sink_cannot_take_now_is_tried_again_and_what_it_never_takes_is_left_out(run_dir, caplog):
    down = Collect(
        lambda number, event: (
            ConnectionError(f"no answer from 0x{number:08x} in {number} s") if number in (3, 4, 5) else None
        )
    )
    picky = Collect(lambda number, event: ValueError("no such kind") if event["kind"] == "evaluation" else None)
    with caplog.at_level(logging.WARNING):
        finish(run_dir, down, picky)
    assert [event["kind"] for event in down.events] == KINDS
    assert [event["kind"] for event in picky.events] == [kind for kind in KINDS if kind != "evaluation"]
    assert sorted(caplog.messages) == [
        "sink0: ConnectionError: no answer from 0x00000003 in 3 s; trying again until it works",
        "sink0: works again",
        "sink1: ValueError: no such kind; going on without this",  # said once of two evaluations
    ]


def test_a_sink_that_cannot_be_made_is_off_and_a_damaged_log_is_said(run_dir, caplog):
    def fail():
        raise ValueError("wrong key")

    with caplog.at_level(logging.WARNING):
        off = Follower("off", fail, run_dir, threading.Event())
        off.start()
        off.join()
        with (run_dir / "events.jsonl").open("ab") as log:
            log.write(b"nonsense\n")
        told = Collect()
        finish(run_dir, told)
    assert [event["kind"] for event in told.events] == KINDS
    assert told.closed == 1
    assert caplog.messages[:2] == [
        "off: ValueError: wrong key; going on without this",
        "off: switched off until the run is resumed",
    ]
    assert f"line {len(KINDS) + 1} is no event" in caplog.messages[2]


def test_a_sink_that_hangs_holds_up_no_other_and_run_end_ends_the_rest(run_dir):
    forever = threading.Event()
    hung, well = Collect(lambda number, event: forever.wait() and None), Collect()
    (stuck, other), over = follow(run_dir, hung, well, over=False)
    resumed_run.second_attempt(run_dir)
    other.join(60)
    assert not other.is_alive()
    assert not over.is_set()
    assert [event["kind"] for event in well.events] == [*KINDS, "resume", "step", "step", "evaluation", "run_end"]
    assert stuck.is_alive()
    forever.set()
    stuck.join()
    assert [event["kind"] for event in hung.events] == [event["kind"] for event in well.events]


@pytest.mark.parametrize("content", ["", "[]", '{"bytes": 3}', "{"])
def test_a_damaged_position_is_the_beginning(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert read_position(tmp_path / "x.json") == (0, 0)


def command(run_dir, *arguments):
    return [sys.executable, "-m", "pipeline.monitoring.deliver", str(run_dir), *arguments]


def call(run_dir, *arguments):
    done = subprocess.run(command(run_dir, *arguments), capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "nowhere to deliver to"),
        (["monitoring.sinks=[wandbe]"], "did you mean 'wandb'"),
        (["sinks=1"], "unknown key"),
    ],
)
def test_what_cannot_be_delivered_is_said(tmp_path, overrides, said):
    code, error = call(resumed_run.first_attempt(tmp_path), *overrides)
    assert (code, said in error) == (2, True), error


def test_it_imports_nothing_heavy():
    heavy = "{'torch', 'ray', 'numpy', 'wandb', 'mlflow', 'tensorboard', 'matplotlib'}"
    code = (
        f"import sys, pipeline.monitoring.deliver; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & "
        "set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_finished_run_is_delivered_later_and_only_by_one(tmp_path):
    pytest.importorskip("tensorboard")
    resumed_run.second_attempt(resumed_run.first_attempt(tmp_path))
    (tmp_path / "sinks").mkdir()
    wanted = "monitoring.sinks=[tensorboard]"
    with deliver._lock(tmp_path / "sinks" / ".lock", lambda: True):
        code, said = call(tmp_path, wanted)
    assert (code, said.strip().endswith("another process delivers this run")) == (1, True)
    assert call(tmp_path, wanted) == (0, "")
    assert behind(tmp_path, ["tensorboard"]) == []


DRIVER = """
import sys, time
from pathlib import Path
sys.path.append(sys.argv[2])
import run_writer as runs
from launchers.supervise.sidecar import Sidecar
run_dir = Path(sys.argv[1])
with Sidecar(runs.config("monitoring.sinks=[tensorboard]"), run_dir) as sidecar:
    recorder = runs.open_run(run_dir, "monitoring.sinks=[tensorboard]")
    sidecar.start()
    runs.record_step(recorder, 0)
    print(sidecar._process.pid, flush=True)
    time.sleep(600)
"""


def test_it_outlives_signals_but_not_its_driver(tmp_path):
    pytest.importorskip("tensorboard")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(Path(runs.__file__).parent)], stdout=subprocess.PIPE
    )
    pid = int(driver.stdout.readline())
    while behind(tmp_path, ["tensorboard"]):
        assert driver.poll() is None
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    with (tmp_path / "events.jsonl").open("ab") as log:  # what the driver wrote with its last breath
        log.write(json.dumps({"schema": 1, "kind": "fault", "time": 0.0, "description": "x"}).encode() + b"\n")
    driver.kill()
    driver.wait()
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.05)
    assert behind(tmp_path, ["tensorboard"]) == []
    assert (tmp_path / "logs" / "sidecar.log").read_text() == ""
