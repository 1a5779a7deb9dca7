"""A recorded alert on its way: log, sidecar process, web server that fails first."""

import subprocess
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import run_writer as runs
from test_delivery import server


def sidecar(run_dir):
    command = [sys.executable, "-m", "pipeline.monitoring.deliver", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def test_an_alert_arrives_once_however_often_the_server_fails(tmp_path):
    with server(503, 0) as (url, kept):
        (tmp_path / "hook").write_text(url)
        (tmp_path / "hook").chmod(0o600)
        recorder = runs.open_run(tmp_path / "run", f"monitoring.alerts.webhook_file={tmp_path / 'hook'}")
        runs.record_step(recorder, 0)
        runs.record_step(recorder, 1, state="exploding", reason="entropy explodes")
        recorder.finish(completed=False)
        said = sidecar(tmp_path / "run").stderr
        assert len(kept) == 3
        assert len({body for _, body in kept}) == 1
        assert b"[critical] pm4" in kept[0][1]
        assert "HTTP status 503" in said
        sidecar(tmp_path / "run")
        assert len(kept) == 3, "what was delivered is not delivered again"
