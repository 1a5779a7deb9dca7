"""``isentrope monitor``: figures for scripts, panels for people, one line for what cannot be read."""

import io
import json
import logging
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.monitoring.console import CleanConsole, CleanFormatter, clean
from pipeline.monitoring.events import EventLog
from pipeline.monitoring.series import Series
from pipeline.monitoring.status import alerts, status_of
from pipeline.monitoring.terminal import size, view
from tests.command_line import answer, call

sys.path.append(str(Path(__file__).parent))
import run_writer as runs

KEYS = [
    "step",
    "entropy",
    "entropy_filtered",
    "band_low",
    "band_high",
    "temperature",
    "state",
    "time_in_band",
    "rms_error",
    "reward",
    "alerts",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run in progress: 30 of 100 steps."""
    run = tmp_path_factory.mktemp("runs") / "pi"
    runs.write_run(run, "name=pi", "steps=100", finish=False, entropy=lambda step: 0.5 if step < 5 else 0.3)
    return run


def rendered(*folders, width=80, height=40, **options):
    console = Console(file=io.StringIO(), width=width, height=height, legacy_windows=False, **options)
    console.print(view([Series(folder) for folder in folders], console))
    return console.file.getvalue()


def test_the_figures_for_scripts(folder, capsys):
    (found,) = answer(capsys, "monitor", str(folder))
    assert set(KEYS) <= set(found)
    expected = {
        "run": str(folder),
        "name": "pi",
        "status": "running",
        "step": 29,
        "steps": 100,
        "entropy": 0.3,
        "state": "tracking",
        "time_in_band": 1.0,
        "entry_step": 13,  # as in the report's test
        "reward": 0.5,
        "pass_at_k": {"1": 0.5, "16": 0.9},
        "evaluation_step": 30,
        "alerts": [],
        "sync": {"bytes": 2**20, "buckets": 2},
        "engines": {"alive": 1, "total": 1},
    }
    assert {name: found[name] for name in expected} == expected
    assert found["memory"]["driver"] > 0.01
    assert found["eta_seconds"] > 0


def test_the_time_left_counts_what_lies_between_steps(tmp_path):
    """Ten seconds a step by the clock, of which the step itself says one; two steps before a restart do not count."""
    now = time.time()
    plain = {"band_low": 0.2, "band_high": 0.4, "entropy": 0.3, "state": "tracking", "seconds": {"total": 1.0}}
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("run_start", {"time": now - 9000, "step": 0, "steps": 50})
        for step in (0, 1):
            log.append("step", {"time": now - 9000 + step, "step": step, **plain})
        log.append("resume", {"time": now - 60, "step": 2, "steps": 50})
        for step in (2, 3, 4):
            log.append("step", {"time": now - 40 + 10 * step, "step": step, **plain})
    found = status_of(Series(tmp_path))
    assert found["eta_seconds"] == pytest.approx(45 * 10)
    assert found["restarts"] == [2]


def test_a_run_that_says_nothing_for_long_is_silent(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("run_start", {"time": time.time() - 3600, "step": 0, "steps": 50})
    found = status_of(Series(tmp_path))
    assert (found["status"], found["step"], found["eta_seconds"]) == ("silent", None, None)
    assert found["silent_seconds"] == pytest.approx(3600, abs=60)
    assert "silent for 1:00:0" in rendered(tmp_path)


def test_which_alerts_hold():
    def alert(step, rule, state):
        return {"kind": "alert", "step": step, "rule": rule, "state": state, "severity": "critical", "reason": "r"}

    events = [alert(1, "a", "begin"), alert(2, "b", "begin"), alert(3, "a", "end"), {"kind": "step"}]
    shown = [(entry["rule"], entry["active"], entry["severity"]) for entry in alerts(events)]
    assert shown == [("a", False, "critical"), ("b", True, "critical")]


def test_a_panel_shows_the_band_the_state_and_the_figures(folder):
    text = rendered(folder)
    for words in (
        "pi (seed 0) running",
        "step 30/100",
        "tracking: H in band",
        "T+ (reweight)",
        "pass@16 0.900",
        "1 MiB",
    ):
        assert words in text
    assert "engines 1 of 1" in text
    assert "░" in text


@pytest.mark.parametrize("width", [30, 44, 80, 200])
def test_it_fits_any_width(folder, width):
    text = rendered(folder, folder, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("─ pi s0") == 2
    assert any(line.count("─ pi s0") == 2 for line in text.splitlines()) == (width == 200)  # side by side


def test_a_run_without_a_step(tmp_path):
    runs.open_run(tmp_path / "run")
    assert "no step yet" in rendered(tmp_path / "run")


def test_what_happened_is_marked_below_the_chart(tmp_path):
    run = tmp_path / "run"
    recorder = runs.open_run(run, "monitoring.alerts.off=[fault]")  # its mark would hide the fault's
    for step in range(10):
        runs.record_step(recorder, step, state="saturated" if step > 7 else "tracking")
    recorder.fault("engine 0 was started again")
    recorder.event("alert", step=5, rule="stall", severity="critical", reason="do this", state="begin")
    text = rendered(run)
    (marks,) = [line for line in text.splitlines() if "~" in line]
    assert "!" in marks
    assert "F" in marks
    assert "critical step 5: stall: do this" in " ".join(text.split())


def test_once_prints_a_panel(folder, capsys):
    code, out, err = call(capsys, "monitor", str(folder), "--once")
    assert (code, err) == (0, "")
    assert "step 30/100" in out


@pytest.mark.parametrize("command", ["monitor", "report"])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, command, str(tmp_path))
    assert (code, out) == (2, "")
    assert "give the folder of a run that was started" in err
    assert len(err.splitlines()) == 1
    assert "events.jsonl" in err


def test_bytes_for_people():
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**40)] == ["0 B", "1023 B", "1.5 KiB", "5 TiB"]


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08"


def test_control_characters_never_reach_the_terminal(tmp_path, capsys):
    recorder = runs.open_run(tmp_path)
    runs.record_step(recorder, 0, state="saturated", reason=ESCAPES)
    recorder.event("alert", step=0, rule=ESCAPES, severity="critical", reason=ESCAPES, state="begin")
    recorder.event("run_end", status="failed", error=ESCAPES)
    recorder._lock.close()
    log = tmp_path / "events.jsonl"
    log.write_text(log.read_text().replace('"name":"pm4"', f'"name":{json.dumps("evil" + ESCAPES)}'))
    for words in (["monitor", str(tmp_path), "--once"], ["report", str(tmp_path), "-o", str(tmp_path / "r.html")]):
        code, out, err = call(capsys, *words)
        assert code == 0
        assert not set(out + err) & set("\x1b\x07\x9b\r\x08")
    console = CleanConsole(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(view([Series(tmp_path)], console))
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # its own colours
    assert not set(text) & set("\x1b\x07\x9b\r\x08")
    assert "evil]0;owned" in text
    code, _, err = call(capsys, "monitor", "/no/" + ESCAPES)
    assert (code, set(err) & set("\x1b\x07")) == (2, set())


def test_damaged_lines_are_shown(tmp_path, capsys):
    runs.write_run(tmp_path, steps=2, finish=False)
    with (tmp_path / "events.jsonl").open("a") as log:
        log.write("broken\n[\n")
    (found,) = answer(capsys, "monitor", str(tmp_path))
    assert found["damaged_lines"] == 2
    assert "line 7 is no event" in found["damage"]
    assert "2 damaged lines of the log skipped: line 7" in " ".join(rendered(tmp_path).split())


def test_a_controller_that_waits_for_its_band_is_not_said_to_track(tmp_path, capsys):
    runs.write_run(tmp_path, steps=30, finish=False, entropy=lambda step: 6 - step / 100)
    (found,) = answer(capsys, "monitor", str(tmp_path))
    assert found["state"] == "waiting"
    assert re.fullmatch(r"H 5\.7\d, band 0.27 to 0.33, about 5\d\d steps at this drift", found["reason"])
    assert "waiting: H 5.7" in rendered(tmp_path)


def test_runs_of_one_name_have_different_titles(tmp_path):
    for place in "ab":
        runs.write_run(tmp_path / place / "pi", "name=pi", steps=1, finish=False)
    text = rendered(tmp_path / "a" / "pi", tmp_path / "b" / "pi")
    assert "pi s0 (a/pi)" in text
    assert "pi s0 (b/pi)" in text


def test_every_command_and_the_log_strip_control_characters(tmp_path, capsys):
    """Of a data file that a stranger wrote, of an error, of a log line with its traceback."""
    file = tmp_path / "questions.jsonl"
    line = {"id": "a", "prompt": f"1{ESCAPES}\t1\n2", "answer": ESCAPES + "1", "verifier": "exact"}
    file.write_text(json.dumps(line) + "\n" + json.dumps(line | {"verifier": "\x1b[31mexat"}))
    for words in (
        ["data", "check", str(file)],
        ["config", "show", f"name={ESCAPES}"],
        ["train", f"--resume={ESCAPES}"],
    ):
        _, out, err = call(capsys, *words)
        assert not set(out + err) & set("\x1b\x07\x9b\r\x08"), words
    assert "1\t1\n2" in call(capsys, "data", "check", str(file))[1]
    try:
        raise ValueError(f"{ESCAPES}what")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (f"{ESCAPES}text",), (ValueError, error, None))
    said = CleanFormatter("%(levelname)s %(message)s").format(record)
    assert said.startswith("ERROR text\nValueError: what")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://evil\x07link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never ended", "]0;never ended"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("\u202etxt.exe", "txt.exe"),
        ("\ud800", ""),
        ("[bold]", "[bold]"),
    ],
)
def test_cleaned_text(text, left):
    assert clean(text) == left
