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
        "3 attempts in a row did not get beyond step 4: lost without a word: node failure, kill or time limit; out of memory"
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
