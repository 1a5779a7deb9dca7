"""The event log: appends, torn lines, resumes, damaged lines."""

import json
import math

import pytest

from pipeline.monitoring.event_kinds import SCHEMA, StepRecord
from pipeline.monitoring.events import EventLog, EventLogError, EventReader, in_force, read_events

RECORD = StepRecord(
    step=3,
    time=1.0,
    entropy_sum=30.0,
    entropy_count=100.0,
    entropy_filtered=math.nan,
    band_low=0.27,
    band_high=0.33,
    target=0.3,
    temperature=1.2,
    command=1.2,
    actuator="reweight",
    state="tracking",
    reason="",
    reward=0.5,
    positives=7,
    all_equal_groups=0.25,
    response_length=8.0,
    truncated=0.0,
    stale_samples=0,
    verifier_errors=0,
    loss=-0.1,
    grad_norm=1.0,
    learning_rate=1e-3,
    weight_version=3,
    metrics={"kl": math.inf},
)


def events_of(*kinds_and_steps):
    return [{"kind": kind, "step": step, "n": n} for n, (kind, step) in enumerate(kinds_and_steps)]


def test_round_trip_and_null_for_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("run_start", {"time": 1, "step": 0})
        log.append("step", RECORD.to_dict())
    first, step = read_events(path)
    assert first == {"schema": SCHEMA, "kind": "run_start", "time": 1.0, "step": 0}
    assert step["entropy"] == 0.3
    assert step["entropy_filtered"] is None
    assert step["metrics"] == {"kl": None}
    assert {"step", "time", "seconds", "tokens", "weight_version", "state"} <= set(step)


def test_entropy_of_no_token_is_nan():
    assert math.isnan(StepRecord(**{**vars(RECORD), "entropy_count": 0.0}).entropy)


def test_a_crash_at_any_byte_loses_at_most_the_last_event(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("step", {**RECORD.to_dict(), "step": 0, "reason": "é\n"})
        log.append("step", {**RECORD.to_dict(), "step": 1})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        assert [event["step"] for event in read_events(path)] == [0]
        with EventLog(path) as log:
            log.append("step", {**RECORD.to_dict(), "step": 9})
        assert [event["step"] for event in read_events(path)] == [0, 9]


def test_a_resume_supersedes_what_it_repeats():
    events = events_of(
        ("run_start", 0),
        ("evaluation", 0),
        ("step", 0),
        ("step", 1),
        ("checkpoint", 2),
        ("evaluation", 2),
        ("step", 2),
        ("alert", 2),
        ("step", 3),
        ("checkpoint", 4),
        ("run_end", None),
        ("resume", 2),
        ("step", 2),
        ("evaluation", 2),
    )
    assert [event["n"] for event in in_force(events)] == [0, 1, 2, 3, 4, 11, 12, 13]


def test_a_repeated_step_supersedes_it_and_what_came_after():
    events = events_of(("step", 0), ("step", 1), ("step", 2), ("step", 1), ("alert", 1))
    assert [event["n"] for event in in_force(events)] == [0, 3, 4]


def test_two_resumes():
    events = events_of(("step", 0), ("step", 1), ("resume", 1), ("step", 1), ("step", 2), ("resume", 0), ("step", 0))
    assert [event["n"] for event in in_force(events) if event["kind"] == "step"] == [6]


def line(kind, **values):
    return json.dumps({"schema": SCHEMA, "kind": kind, "time": 1.0, **values}).encode()


DAMAGED = {
    b"broken": "malformed",
    b"": "truncated",
    b'{"kind": "step"}': "missing required field `schema`",
    b'{"schema": 1, "time": 1.0, "step": 3}': "missing required field `kind`",
    b'{"schema": null}': "Expected `int`, got `null`",
    line("step", schema=SCHEMA + 1): "update isentrope",
    line("stfp"): "unknown kind",
    line("step"): "missing required field",
    line("resume", step="2"): "Expected `int`, got `str`",
    line("resume", step=-5): "Expected `int` >= 0",
    line("resume", step=10**25): "Expected `int` <= 1000000",
    line("run_end", status=3): "Expected `str`",
    line("run_end", status="well"): "Invalid enum value",
    line("evaluation", step=1, pass_at_k={"1": 0.5}): "Expected `object`, got `float`",
    line("evaluation", step=1, pass_at_k={"one": {"value": 1, "low": 0, "high": 1}}): "matching regex",
    b"[" * 100_000: "Expected `object`",
    b'{"schema": 1, "kind": ' + b"[" * 100_000: "Expected `str`",
    b'{"schema": 1, "more": ' + b"[" * 100_000: "recursion",
    b"\xff\xfe": "malformed",
}


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda line: str(line[:40]))
def test_a_damaged_line_is_skipped_counted_and_said_once(tmp_path, caplog, damaged):
    path = tmp_path / "events.jsonl"
    end = line("run_end", status="completed")
    path.write_bytes(b"\n".join([line("run_start", step=0), damaged, damaged, end, b""]))
    reader = EventReader(path)
    assert [event["kind"] for event in reader] == ["run_start", "run_end"]
    assert (reader.damaged, reader.lines, reader.offset) == (2, 4, path.stat().st_size)
    assert reader.damage.startswith("line 2 is no event: ")
    assert DAMAGED[damaged] in reader.damage
    (record,) = caplog.records
    assert (record.levelname, str(path) in record.getMessage()) == ("WARNING", True)


def test_a_reader_that_takes_line_by_line_passes_damaged_ones(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"broken\nbroken\n" + line("run_start", step=0) + b"\nbroken\n")
    reader = EventReader(path)
    assert [len(reader.poll(limit_bytes=1)) for _ in range(3)] == [1, 0, 0]
    assert reader.offset == path.stat().st_size


def test_a_missing_log_names_the_remedy(tmp_path):
    with pytest.raises(EventLogError, match="folder of a run"):
        read_events(tmp_path / "events.jsonl")
