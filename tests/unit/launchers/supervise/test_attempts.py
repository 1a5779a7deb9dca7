"""The record of attempts and the rule that ends a crash loop."""

import json

import pytest

from launchers.supervise.attempts import Attempt, AttemptLog, gives_up, progress


def attempt(first_step, end="", reason=""):
    return Attempt(0, "7", 0, ("n1",), first_step, 0.0, end, reason=reason)


@pytest.mark.parametrize(
    ("past", "step", "stops"),
    [
        ([], 0, False),
        ([attempt(0)] * 2, 0, False),
        ([attempt(0)] * 3, 0, True),
        ([attempt(0)] * 3, 1, False),  # the last one got somewhere
        ([attempt(0), attempt(5), attempt(5), attempt(5)], 5, True),
        ([attempt(5), attempt(5), attempt(8)], 8, False),
        ([attempt(5), attempt(5), attempt(5, "cancelled"), attempt(5)], 5, False),  # somebody intervened
        ([attempt(5, "saved")] * 3, 5, True),  # a time limit too short for one step
        ([attempt(0, "saved"), attempt(40, "saved"), attempt(80, "saved")], 120, False),
    ],
)
def test_three_attempts_without_progress_are_enough(past, step, stops):
    assert bool(gives_up(past, step, 3)) is stops


def test_the_reason_names_every_cause():
    past = [attempt(4, "again", "out of memory"), attempt(4), attempt(4, "again", "out of memory")]
    assert gives_up(past, 4, 3) == (
        "3 attempts in a row did not get beyond step 4: lost without a word: node failure, kill or time limit; "
        "out of memory"
    )


def test_the_log_pairs_starts_with_ends_and_survives_a_torn_line(tmp_path):
    log = AttemptLog(tmp_path)
    assert log.read() == []
    log.start("7", 0, ["n1", "n2"], 0)
    second = log.start("7", 1, ["n1", "n2"], 10)
    log.end(second, "completed", 20)
    with log.path.open("a") as file:
        file.write('{"number": 2, "jo')
    lost, done = log.read()
    assert (lost.number, lost.end, lost.last_step) == (0, "", None)
    assert (done.number, done.restart, done.first_step, done.end, done.last_step) == (1, 1, 10, "completed", 20)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b'{"number": 1}',
        b'{"number": 1, "end": "failed"}',
        b'{"number": 9, "end": "failed", "last_step": 1, "ended": 1.0}',
        b'{"number": "1", "job_id": "7", "restart": 0, "nodes": ["n"], "first_step": 0, "started": 1.0}',
        b'{"number": 1, "job_id": "7", "restart": 0, "nodes": 3, "first_step": 0, "started": 1.0}',
        b"\xff\x00",
        b"",
    ],
)
def test_a_damaged_line_costs_that_line_and_is_told(tmp_path, caplog, line):
    log = AttemptLog(tmp_path)
    first = log.start("7", 0, ["n1"], 0)
    with log.path.open("ab") as file:
        file.write(line + b"\n")
    log.end(first, "again", 5)
    second = log.start("7", 1, ["n1"], 5)
    assert [(attempt.number, attempt.end) for attempt in log.read()] == [(0, "again"), (1, "")]
    assert second.number == 1
    is_whole = b'"number": 9' in line  # the end of an attempt whose start is lost
    assert ("line 2 is no attempt" in caplog.text) != is_whole


def test_a_lost_start_does_not_give_its_number_away(tmp_path):
    log = AttemptLog(tmp_path)
    log.start("7", 0, ["n1"], 0)
    log.start("7", 1, ["n1"], 0)
    lines = log.path.read_bytes().split(b"\n")
    log.path.write_bytes(b"\n".join([b"nonsense", *lines[1:]]))
    assert log.start("7", 2, ["n1"], 0).number == 2


def test_progress_counts_steps_of_the_event_log(tmp_path):
    assert progress(tmp_path).step == 0
    kinds = [("run_start", 0), ("step", 0), ("step", 1), ("resume", 1), ("step", 1)]
    step_fields = {"entropy": 0.3, "band_low": 0.2, "band_high": 0.4, "state": "tracking"}
    lines = [json.dumps({"schema": 1, "kind": kind, "time": 1, "step": step, **step_fields}) for kind, step in kinds]
    end = json.dumps({"schema": 1, "kind": "run_end", "time": 1, "status": "failed", "error": "boom"})
    lines.insert(3, "a damaged line, after which the run is as far as it was")
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, end, ""]))
    found = progress(tmp_path)
    assert (found.step, found.status, found.error) == (2, "failed", "boom")
