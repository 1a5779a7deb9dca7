"""Whole runs with sinks: dead ones change nothing, and what TensorBoard's own server shows after a resume."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from pipeline.monitoring.deliver import behind
from pipeline.ports import free_port
from tests.integration.forks import isentrope
from tests.step_events import essence

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit/pipeline/monitoring"))
import resumed_run
import run_writer as runs

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ["train", "--config", str(ROOT / "configs/quickstart.yaml")]
SMALL = [
    "runtime=inline",
    "learner.tensor_model_parallel_size=1",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "evaluation.prompts=8",
    "evaluation.samples=4",
    "evaluation.k=[1,4]",
    "monitoring.progress=false",
    "steps=20",
]


@pytest.fixture
def silent_server():
    """Takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept():
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:  # closed: the test is over
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", kept
        for connection in kept:
            connection.close()
        server.shutdown(socket.SHUT_RDWR)


def train(run_dir, *overrides, **variables):
    done = subprocess.run(
        [sys.executable, "-m", "launchers.cli.main", *COMMAND, f"run_dir={run_dir}", *SMALL, *overrides],
        cwd=run_dir.parent,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def computed(run_dir):
    """All that a run computed: its log without what the clock says."""
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [{key: value for key, value in essence(event).items() if key != "config_hash"} for event in events]


def processes_with(variable):
    """Command lines of the processes that have ``variable`` (name=value) in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (folder / "environ").read_text(errors="replace").split("\0"):
                found.append((folder / "cmdline").read_text(errors="replace"))
        except OSError:  # it ended meanwhile
            continue
    return found


def test_dead_sinks_neither_stop_a_run_nor_change_it(tmp_path, silent_server):
    """MLflow's server never answers, W&B's cannot be reached; TensorBoard beside them gets everything."""
    for library in ("mlflow", "wandb", "tensorboard"):
        pytest.importorskip(library, reason="needs requirements/monitor.txt")
    (address, connections), unreachable = silent_server, f"http://127.0.0.1:{free_port()}"
    done = train(
        tmp_path / "dead",
        "name=pi",
        "monitoring.sinks=[mlflow,wandb,tensorboard]",
        f"monitoring.mlflow.tracking_uri={address}",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL=unreachable,
        MLFLOW_HTTP_REQUEST_TIMEOUT="2",
    )
    undisturbed = isentrope(*COMMAND, f"run_dir={tmp_path}/none", *SMALL, cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    assert computed(tmp_path / "dead") == computed(tmp_path / "none")
    assert connections, "the silent server was asked"
    assert behind(tmp_path / "dead", ["mlflow", "wandb", "tensorboard"]) == ["mlflow", "wandb"]
    assert "mlflow and wandb did not take every event" in done.stderr
    said = (tmp_path / "dead" / "logs" / "sidecar.log").read_text()
    assert len(re.findall(r"mlflow: ConnectionError: .*; trying again until it works", said)) == 1, said
    assert "0" * 40 not in said
    deadline = time.monotonic() + 60  # W&B's own process looks whether its parent is there every now and then
    while processes_with(f"WANDB_BASE_URL={unreachable}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with(f"WANDB_BASE_URL={unreachable}") == []


def get(port, path, **parameters):
    with urllib.request.urlopen(
        f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(parameters)}", timeout=30
    ) as answer:
        return json.load(answer)


def test_tensorboards_server_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="needs requirements/monitor.txt")
    from pipeline.monitoring.sinks.tensorboard import TensorboardSink

    run_dir, config = tmp_path / "run", runs.config("monitoring.sinks=[tensorboard]")
    resumed_run.first_attempt(run_dir)
    position = resumed_run.deliver(TensorboardSink(config, run_dir), run_dir)
    resumed_run.second_attempt(run_dir)
    resumed_run.deliver(TensorboardSink(config, run_dir), run_dir, position)
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={tmp_path}", f"--port={port}", "--host=127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        tags = wait_for_tags(server, port)
        assert set(tags) == {"run/tensorboard/train", "run/tensorboard/evaluation"}
        assert "entropy/band_low" in tags["run/tensorboard/train"]
        points = get(port, "/data/plugin/scalars/scalars", run="run/tensorboard/train", tag="entropy/mean")
        assert [(step, round(value, 6)) for _, step, value in points] == [(0, 0.3), (1, 0.3), (2, 0.75), (3, 0.75)]
        points = get(port, "/data/plugin/scalars/scalars", run="run/tensorboard/evaluation", tag="evaluation/pass_at_1")
        assert [(step, round(value, 6)) for _, step, value in points] == [(0, 0.3), (2, 0.4), (4, 0.5)]
        layout = get(port, "/data/plugin/custom_scalars/layout")
        assert [chart["title"] for chart in layout["category"][0]["chart"]] == [
            "filtered entropy in its band",
            "T+ and command",
        ]
        texts = get(port, "/data/plugin/text/tags")
        assert {"config", "faults", "alerts/critical"} <= set(texts["run/tensorboard/train"])
    finally:
        server.terminate()
        server.wait()


def wait_for_tags(server, port):
    """Tags by run once both runs are loaded."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None
        try:
            tags = get(port, "/data/plugin/scalars/tags")
        except urllib.error.URLError:  # not listening yet
            tags = {}
        if len(tags) == 2 and all(tags.values()):
            return tags
        time.sleep(0.2)
    raise AssertionError("TensorBoard loads nothing")
