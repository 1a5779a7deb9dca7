"""Alerts on their way to people: a real HTTP server, a stand-in for the node's sendmail and for Slurm's scontrol."""

import json
import logging
import sys
import threading
import time
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.monitoring.sinks.alert_delivery import (
    AlertDelivery,
    DeliveryError,
    Mail,
    SlurmComment,
    Webhook,
    alert_sinks,
    delivery_problems,
    describe,
)


def alert(state="begin", rule="reward_drop", seconds_ago=0.0):
    return {
        "kind": "alert",
        "time": time.time() - seconds_ago,
        "step": 7,
        "rule": rule,
        "severity": "critical",
        "state": state,
        "reason": "reward < best & falling. Remedy: look"
        if state == "begin"
        else "over after 0:01:00, begun at step 3",
    }


@contextmanager
def server(*answers):
    """A web server that gives these statuses in turn, then 200, and keeps what it is sent; a status of 0 hangs up."""
    left, kept = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            kept.append((self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            status = left.pop(0) if left else 200
            if status:
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/secret-token", kept
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture
def webhook_file(tmp_path):
    file = tmp_path / "webhook"
    file.touch(0o600)
    return file


def config(**alerts):
    return load_config(
        Path("quickstart.yaml"), [f"monitoring.alerts.{name}={value}" for name, value in alerts.items()], check=False
    )


def a_program(folder, name, script):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)


def test_what_people_read():
    subject, text = describe(alert(), "pi (/runs/pi)")
    assert subject == "isentrope: critical: reward_drop"
    assert text == "[critical] pi (/runs/pi), step 7: reward_drop: reward < best & falling. Remedy: look"
    subject, text = describe(alert("end"), "pi (/runs/pi)")
    assert (subject, text) == (
        "isentrope: reward_drop is over",
        "[over] pi (/runs/pi), step 7: reward_drop is over after 0:01:00, begun at step 3",
    )


def test_a_webhook_takes_what_slack_takes(webhook_file):
    with server() as (url, kept):
        webhook_file.write_text(url + "\n")
        AlertDelivery(Webhook(webhook_file), "pi").event(alert())
    ((kind, body),) = kept
    assert kind == "application/json"
    assert json.loads(body) == {
        "text": "[critical] pi, step 7: reward_drop: reward &lt; best &amp; falling. Remedy: look"
    }


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (500, OSError, "HTTP status 500"),
        (429, OSError, "HTTP status 429"),
        (0, OSError, "no HTTP answer: .*disconnected"),
        (404, DeliveryError, "not sent: .*reward_drop.* HTTP status 404: check the URL"),
        (302, DeliveryError, "HTTP status 302"),
    ],
)
def test_a_webhook_that_fails_says_whether_to_come_again_and_keeps_its_secret(webhook_file, status, error, said):
    with server(status) as (url, kept):
        webhook_file.write_text(url)
        sink = AlertDelivery(Webhook(webhook_file), "pi")
        with pytest.raises(error, match=said) as caught:
            sink.event(alert())
        assert "secret-token" not in str(caught.value)
        sink.event(alert("end"))
    assert len(kept) == 2


def test_the_log_does_not_tell_the_secret_either(webhook_file, caplog):
    caplog.set_level(logging.DEBUG)
    with server() as (url, _):
        webhook_file.write_text(url)
        Webhook(webhook_file).send("subject", "text")
    assert "secret-token" not in caplog.text


def test_what_is_no_url_will_never_be_one(webhook_file):
    webhook_file.write_text("http://127.0.0.1:secret/")
    with pytest.raises(DeliveryError, match="not a URL") as caught:
        Webhook(webhook_file).send("subject", "text")
    assert "secret" not in str(caught.value)


def test_nobody_there_is_not_now(webhook_file):
    with server() as (url, _):
        webhook_file.write_text(url)
    with pytest.raises(OSError, match="refused"):
        Webhook(webhook_file).send("subject", "text")


def test_other_events_and_old_alerts_are_not_sent(webhook_file, caplog):
    with server() as (url, kept):
        webhook_file.write_text(url)
        sink = AlertDelivery(Webhook(webhook_file), "pi")
        sink.event({"kind": "step", "step": 1, "time": time.time()})
        sink.event(alert(seconds_ago=7200))
        sink.close()
    assert kept == []
    assert "not sent by webhook" in caplog.text
    assert "reward_drop" in caplog.text, "never in silence"


def test_mail_goes_through_sendmail(tmp_path, monkeypatch):
    a_program(tmp_path, "sendmail", f"import sys; open('{tmp_path}/mail', 'wb').write(sys.stdin.buffer.read())\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    AlertDelivery(Mail("me@example.org"), "pi").event(alert())
    message = message_from_bytes((tmp_path / "mail").read_bytes())
    assert (message["To"], message["Subject"]) == ("me@example.org", "isentrope: critical: reward_drop")
    assert message.get_payload(decode=True).decode().strip().endswith("Remedy: look")


def test_a_comment_goes_through_scontrol(tmp_path, monkeypatch):
    a_program(tmp_path, "scontrol", f"import sys; open('{tmp_path}/said', 'w').write(repr(sys.argv[1:]))\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    long = alert() | {"reason": "one\ntwo " + "x" * 999}
    AlertDelivery(SlurmComment("17"), "pi").event(long)
    command, job, comment = eval((tmp_path / "said").read_text())
    assert (command, job) == ("update", "JobId=17")
    assert comment.startswith("Comment=[critical] pi, step 7: reward_drop: one two xxx")
    assert len(comment) == len("Comment=") + 250


def test_a_program_that_fails_tells_why(tmp_path, monkeypatch):
    a_program(tmp_path, "sendmail", "import sys; sys.exit('no such user')\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"sendmail failed \(1\): no such user"):
        Mail("me@example.org").send("subject", "text")


def test_a_sink_for_every_channel_asked_for(tmp_path, webhook_file, monkeypatch):
    webhook_file.write_text("https://example.org/hook")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    asked = config(webhook_file=webhook_file, mail="me@example.org", slurm_comment="true")
    assert list(alert_sinks(asked, tmp_path)) == ["alerts_webhook", "alerts_mail", "alerts_slurm_comment"]
    assert all(isinstance(build(), AlertDelivery) for build in alert_sinks(asked, tmp_path).values())
    assert alert_sinks(config(), tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        ("https://example.org/hook", 0o644, "everyone can read (mode 644)"),
        ("", 0o600, "does not hold one URL"),
        ("example.org", 0o600, "does not hold one URL"),
        ("https://a.org\nhttps://b.org", 0o600, "does not hold one URL"),
        ("https://example.org/hook\n", 0o640, None),
    ],
)
def test_the_file_of_a_webhook(webhook_file, content, mode, problem):
    webhook_file.write_text(content)
    webhook_file.chmod(mode)
    found = delivery_problems(config(webhook_file=webhook_file))
    assert [problem in p.problem for p in found] == ([True] if problem else [])
    assert "example.org" not in "".join(p.render() for p in found)


def test_what_cannot_be_delivered_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("pipeline.monitoring.sinks.alert_delivery.SENDMAIL_FOLDERS", str(tmp_path))
    asked = config(webhook_file=tmp_path / "no", mail="nobody", slurm_comment="true")
    assert [(p.key.rpartition(".")[2], p.problem) for p in delivery_problems(asked)] == [
        ("webhook_file", "no such file"),
        ("mail", "not a mail address"),
        ("mail", "this machine has no sendmail"),
        ("slurm_comment", "this is not a Slurm job"),
    ]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert [p.problem for p in delivery_problems(config(slurm_comment="true"))] == ["there is no scontrol here"]
