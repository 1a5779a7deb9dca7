"""What counts as a stall, and what happens then."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launchers.supervise import watchdog
from launchers.supervise.watchdog import Patience, Supervision, Watchdog, read_heartbeat, stall_limit, write_heartbeat
from pipeline.config.load import load_config
from pipeline.config.schema import StallConfig
from pipeline.monitoring.recorder import Recorder

ROOT = Path(__file__).resolve().parents[4]


def config(*overrides):
    return load_config(Path("recipe/pm4.yaml"), ["monitoring.progress=false", *overrides])


@pytest.mark.parametrize(
    ("factor", "least", "typical", "limit"),
    [
        (20, 600, 0.2, 600),  # never less than ten minutes
        (20, 600, 30, 630),  # itself, and 20 more of half a minute
        (20, 600, 60, 1260),
        (20, 600, 600, 4394.7),  # 1.2 hours, not 3.3
        (20, 600, 1400, 7196.6),  # 2 hours, not 7.8
        (20, 600, math.nan, 4394.7),  # the first of its kind: as if it took ten minutes
        (1, 0.05, math.nan, 0.1),
        (0, 600, 60, math.inf),  # never
        (0, 600, math.nan, math.inf),
    ],
)
def test_the_limit_by_hand(factor, least, typical, limit):
    assert stall_limit(factor, least, typical) == pytest.approx(limit, abs=0.05)


@pytest.mark.parametrize("typical", [0.2, 60, 600, 1400, 2600])
def test_a_slow_step_is_told_before_the_watchdog_acts(typical):
    rule = yaml.safe_load((ROOT / "configs/alerts/slow_step.yaml").read_text())
    told = max(rule["when"]["above"] * typical, rule["guard"]["above"])
    assert told < stall_limit(StallConfig().factor, StallConfig().min_seconds, typical)


@given(st.floats(0.01, 1e5), st.floats(1.001, 10))
def test_a_longer_step_may_take_longer_but_not_in_proportion(typical, times):
    short, long = (stall_limit(20, 1e-9, seconds) for seconds in (typical, typical * times))
    assert short < long <= short * times * (1 + 1e-9)
    assert short > typical


def test_time_that_nobody_saw_does_not_count(monkeypatch):
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    patience, seen = Patience(), []
    # Every 5 s; then the job is suspended for an hour (15 s of it count); then something moves.
    for passed, sign in [(5, "a"), (5, "a"), (5, "a"), (3600, "a"), (5, "a"), (5, "b"), (5, "b")]:
        now += passed
        seen.append(patience.seconds(sign))
    assert seen == [0, 5, 10, 25, 30, 0, 5]


def test_a_dead_sglang_engine_may_be_found_and_started_again_within_a_step(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(65_000_000_000)  # sparse
    words = ["monitoring.stall.min_seconds=60", f"model.hf_path={tmp_path}", "rollout.sglang.startup_timeout_s=200"]
    words += ["rollout.sglang.liveness_timeout_s=70"]
    native, sglang = (
        load_config(
            Path("recipe/pm4.yaml"), [*words, f"rollout.engine={engine}"], check=False
        )  # weights only, no model
        for engine in ("native", "sglang")
    )
    assert watchdog.least_seconds(native) == 60
    assert watchdog.least_seconds(sglang) == 60 + 70 + 200 + 650


class Others:
    """One that answers, one that does not."""

    def collect(self, folder):
        (folder / "learner-0.txt").write_text("its stack")
        return ["learner-1"]

    def end_silent(self):
        raise AssertionError("nobody is ended when stalls are only reported")


def test_a_stall_is_reported_once_with_stacks(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "INTERVAL_S", 0.01)
    limits = ["monitoring.stall.min_seconds=0.05", "monitoring.stall.factor=1", "monitoring.stall.action=report"]
    with Recorder(tmp_path / "run", config(*limits)) as recorder:
        recorder.start(4)
        with recorder.clock()("train"), Watchdog(recorder, config(*limits), Others()):
            while not list(stalls(recorder)):
                time.sleep(0.01)
            time.sleep(0.3)
        beat = read_heartbeat(recorder.run_dir)
        (stall,) = stalls(recorder)
        recorder.finish(completed=False)
    assert (beat["step"], beat["activity"], beat["phase"], beat["pid"]) == (4, "step", "train", os.getpid())
    wanted = {"step": 4, "activity": "step", "phase": "train", "factor": 1, "silent": ["learner-1"], "action": "report"}
    assert {name: stall[name] for name in wanted} == wanted
    assert stall["seconds"] > 0.05
    driver, learner = (tmp_path / "run" / path for path in stall["stacks"])
    assert (driver.name, learner.read_text()) == ("driver.txt", "its stack")
    assert "test_a_stall_is_reported_once_with_stacks" in driver.read_text()


def stalls(recorder):
    lines = (recorder.run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "stall"]


HANGS = """
import subprocess, sys, time
from pathlib import Path
from launchers.supervise import watchdog
from pipeline.config.load import load_config
from pipeline.monitoring.recorder import Recorder

watchdog.INTERVAL_S = 0.05
run_dir = Path(sys.argv[1])
words = ["monitoring.progress=false", "monitoring.stall.min_seconds=0.2", "monitoring.stall.factor=1"]
config = load_config(Path("recipe/pm4.yaml"), words)
with Recorder(run_dir, config) as recorder, watchdog.Watchdog(recorder, config, None):
    recorder.start(0)
    print(subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid, flush=True)
    time.sleep(600)
"""


def lasting(run_dir):
    """The last two events but for the alert that a stall raises."""
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] != "alert"][-2:]


def test_a_stalled_process_ends_with_its_stack_and_how_to_go_on(tmp_path):
    run_dir = tmp_path / "a run"
    done = subprocess.run(
        [sys.executable, "-c", HANGS, run_dir], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    child = int(done.stdout)
    os.kill(child, 9)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"stalled; go on with: isentrope train --resume '{run_dir}'"
    stall, end = lasting(run_dir)
    assert (stall["kind"], stall["action"], stall["activity"]) == ("stall", "restart", "start")
    assert (end["kind"], end["status"]) == ("run_end", "failed")
    assert end["error"].startswith("stalled: 0 s in start after 0 steps; stacks: ")
    (driver,) = (run_dir / path for path in stall["stacks"])
    assert "<module>" in driver.read_text()
    assert f"pid {child}" in driver.read_text()


def test_a_stalled_process_ends_also_where_no_stacks_can_be_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").write_text("a file where stacks need a folder")
    words = [sys.executable, "-c", HANGS, tmp_path / "run"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    os.kill(int(done.stdout), 9)
    assert done.returncode == 1
    stall, end = lasting(tmp_path / "run")
    assert (stall["kind"], stall["stacks"], end["status"]) == ("stall", [], "failed")


def test_who_waits_for_what_hangs_waits_only_so_long():
    free = threading.Event()
    assert not watchdog.within(0.05, free.wait)
    free.set()
    assert watchdog.within(60, free.wait)


def test_a_process_whose_heart_stands_still_is_complained_about_with_its_stack(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    monkeypatch.setattr(watchdog, "INTERVAL_S", 1.0)
    limits = config("monitoring.stall.min_seconds=30", "monitoring.stall.factor=20")
    silent = subprocess.Popen(["sleep", "600"])
    now = next(clock)
    supervision = Supervision(tmp_path, silent.pid, limits)

    def look():
        nonlocal now
        now = next(clock)  # a second later
        return supervision.complaint()

    try:
        assert not any(look() for _ in range(100)), "no heartbeat yet"
        write_heartbeat(tmp_path, {})
        assert not any(look() for _ in range(100)), "that is another process's"
        (tmp_path / "heartbeat.json").write_text(json.dumps({"pid": silent.pid, "time": 1.0}))
        said = [look() for _ in range(32)]
    finally:
        silent.kill()
        silent.wait()
    assert said[:31] == [""] * 31
    assert "gave no sign of life for 31 s" in said[31]
    (stack,) = tmp_path.glob("logs/stacks/*/driver.txt")
    assert f"pid {silent.pid}" in stack.read_text()


@pytest.mark.parametrize("off", ["monitoring.stall.factor=0", "monitoring.stall.action=report"])
def test_without_restarts_nobody_complains(tmp_path, off):
    (tmp_path / "heartbeat.json").write_text(json.dumps({"pid": 1, "time": 1.0}))
    supervision = Supervision(tmp_path, 1, config("monitoring.stall.min_seconds=0.001", off))
    assert supervision.complaint() == ""
    assert supervision._looked == -math.inf


def test_two_threads_write_whole_lines(tmp_path):
    with Recorder(tmp_path / "run", config()) as recorder:
        recorder.start(0)
        threads = [
            threading.Thread(
                target=lambda i=i: [recorder.fault(f"{i} {'x' * 500}") or recorder.tick(0.0) for _ in range(200)]
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        recorder.finish(completed=False)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "fault" for event in events) == 800


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b'{"pid": 1}', b'{"time": "now", "pid": 1}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_heartbeat_counts_as_none_and_is_told(tmp_path, caplog, content):
    (tmp_path / "heartbeat.json").write_bytes(content)
    assert read_heartbeat(tmp_path) == {}
    assert "heartbeat.json is no heartbeat" in caplog.text
