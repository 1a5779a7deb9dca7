"""``isentrope alerts`` as a user meets it, and how a run is kept from starting when nobody could be told."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.command_line import call

sys.path.append(str(Path(__file__).parents[1] / "pipeline" / "monitoring"))
import run_writer as runs


@pytest.fixture(autouse=True)
def _restore_hook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def rules(tmp_path):
    folder = tmp_path / "rules"
    folder.mkdir()
    (folder / "hot.yaml").write_text(
        "severity: warning\nmessage: T+ is {control/temperature}\nremedy: cool down\n"
        "when: {metric: control/temperature, above: 1.1}\nsteps: 3\n"
    )
    return folder


def test_list_shows_what_a_user_must_know_of_a_rule(capsys, rules):
    code, out, _ = call(capsys, "alerts", "list", "--rules", rules)
    assert code == 0
    assert "hot (warning)\n  raised:  control/temperature above 1.1, 3 steps in a row\n  remedy:  cool down\n" in out
    assert "not_reachable (critical)" in out
    code, out, _ = call(capsys, "alerts", "list", "--json")
    assert {"rule", "severity", "condition", "message", "remedy", "file"} == set(json.loads(out)[0])


def test_a_recorded_run_through_the_rules(capsys, tmp_path, rules):
    # T+ is 1.2 in every step; not reachable from the third on
    recorder = runs.open_run(tmp_path / "run")
    for step in range(20):
        said = "target not reachable: held at H=0.3" if step >= 2 else "H in band"
        runs.record_step(recorder, step, state="saturated" if step >= 2 else "tracking", reason=said)
    code, out, _ = call(capsys, "alerts", "test", tmp_path / "run", "--rules", rules)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path / 'run'}: 2 alerts"
    assert lines[1] == "  step 2 to the end: hot (warning): T+ is 1.2. Remedy: cool down"
    assert lines[2].startswith("  step 11 to the end: not_reachable (critical): target not reachable")
    assert "  not judged: disk_filling: no log holds disk/hours_left" in lines
    code, out, _ = call(capsys, "alerts", "test", tmp_path / "run", "--json")
    ((result,), code_) = json.loads(out), code
    assert code_ == 0
    assert [(a["rule"], a["begin_step"], a["end_step"]) for a in result["alerts"]] == [("not_reachable", 11, None)]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["alerts", "test"], 2, "give run folders, or --deliver with --config FILE"),
        (["alerts", "test", "--deliver"], 2, "give run folders, or --deliver with --config FILE"),
        (["alerts", "test", "/no/run"], 2, "/no/run/events.jsonl does not exist: give the folder of a run"),
        (["alerts", "list", "--rules", "/no/rules"], 2, "monitoring.alerts.rules: '/no/rules'"),
        (["alerts", "test", "--deliver", "--config", "quickstart.yaml"], 2, "no channel is configured"),
        (["config", "validate", "-c", "quickstart.yaml", "monitoring.alerts.off=[stal]"], 2, "did you mean stall?"),
        (["train", "-c", "quickstart.yaml", "monitoring.alerts.webhook_file=/no/such"], 2, "'/no/such'"),
    ],
)
def test_bad_input_is_told_before_anything_starts(capsys, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        ended, _, err = call(capsys, *words)
    except RuntimeError as error:  # what the command line prints through its exception hook
        ended, err = 1, str(error)
    assert ended == code
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "code", "said"), [(200, 0, "webhook: delivered"), (503, 1, "webhook: not delivered: HTTP status 503")]
)
def test_a_test_alert_is_delivered(capsys, tmp_path, status, code, said):
    kept = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            kept.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.handle_request)
        thread.start()
        (tmp_path / "hook").write_text(f"http://127.0.0.1:{httpd.server_port}/x")
        (tmp_path / "hook").chmod(0o600)
        config = tmp_path / "mine.yaml"
        config.write_text(f"defaults: [quickstart.yaml]\nmonitoring: {{alerts: {{webhook_file: {tmp_path}/hook}}}}\n")
        ended, out, err = call(capsys, "alerts", "test", "--deliver", "--config", config)
        thread.join()
    assert (ended, (out + err).strip()) == (code, said)
    assert "this is a test" in kept[0]["text"]
