"""The figures of a run as columns: always what the raw events say."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.monitoring import events
from pipeline.monitoring import series as module
from pipeline.monitoring.event_kinds import SCHEMA, parse_event
from pipeline.monitoring.events import in_force, read_all_events
from pipeline.monitoring.metrics import scalars
from pipeline.monitoring.series import Series

NAMES = ("entropy/mean", "control/temperature", "mismatch/kl", "evaluation/pass_at_1")


def step_event(step, value):
    """A small step; every fifth value is missing, a metric of the learner comes and goes."""
    return {
        "kind": "step",
        "time": 100.0 + value,
        "step": step,
        "entropy": None if value % 5 == 0 else value / 7,
        "band_low": 0.2,
        "band_high": 0.4,
        "temperature": 1 + value / 100,
        "state": ("tracking", "saturated", "holding")[value % 3],
        "reason": f"value {value}",
        "metrics": {"mismatch_kl": value / 1000} if value % 4 else {},
    }


def other(kind, step, value):
    event = {"kind": kind, "time": 100.0 + value, "step": step, "reason": f"value {value}"}
    if kind == "alert":
        event |= {"rule": "x", "severity": "warning", "state": "begin"}
    if kind == "evaluation":
        event["pass_at_k"] = {"1": {"value": value / 9, "low": 0.0, "high": 1.0}}
    if kind == "fault":
        event["description"] = "engine 0"
        del event["step"]
    return event


def line(event):
    return json.dumps({"schema": SCHEMA, **event}).encode() + b"\n"


@st.composite
def logs(draw):
    """Chunks of a log in the order written; after each somebody may look. Steps, resumes, torn lines, other events."""
    chunks, step, value = [], 0, 0
    for _ in range(draw(st.integers(1, 12))):
        value += 1
        act = draw(
            st.sampled_from(["steps", "steps", "steps", "resume", "alert", "evaluation", "fault", "repeat", "gap"])
        )
        if act == "steps":
            count = draw(st.integers(1, 30))
            chunks.append(b"".join(line(step_event(step + i, value + i)) for i in range(count)))
            step, value = step + count, value + count
        elif act == "resume":
            torn = draw(st.booleans())
            step = draw(st.integers(0, step))
            chunks.append((torn, line({"kind": "resume", "time": 1.0, "step": step})))
        elif act in ("repeat", "gap"):
            step = max(0, step - 3) if act == "repeat" else step + 40
            chunks.append(line(step_event(step, value)))
            step += 1
        else:
            chunks.append(line(other(act, step, value)))
    return chunks


def by_hand(events, name):
    """{step: number} of the events in force."""
    kinds = ("evaluation",) if name.startswith("evaluation/") else ("step",)
    return {e["step"]: found[name] for e in events if e["kind"] in kinds and name in (found := scalars(e))}


def check(series, path, points):
    events = in_force(read_all_events(path))
    taken = [e["step"] for e in events if e["kind"] == "step"]
    assert series.steps == max([*taken, -1]) + 1
    chart = series.read(NAMES, points=points)
    steps = chart["step"].tolist()
    assert len(steps) <= points
    width = 1
    while (series.steps // width) + 1 > points:
        width *= 2
    for name in NAMES:
        # An evaluation after more updates than there are steps in force (a step was repeated without a resume) is not
        # shown.
        truth = {step: value for step, value in by_hand(events, name).items() if step <= series.steps}
        buckets = {}
        for step, number in truth.items():
            buckets.setdefault(step // width, []).append(number)
        got = {step // width: i for i, step in enumerate(steps)}
        assert set(buckets) <= set(got)
        for bucket, i in got.items():
            numbers = buckets.get(bucket)
            curve = {key: float(values[i]) for key, values in chart[name].items()}
            if numbers is None:
                assert all(map(math.isnan, curve.values()))
            else:
                assert (curve["low"], curve["high"]) == (min(numbers), max(numbers))
                assert curve["mean"] == pytest.approx(sum(numbers) / len(numbers), rel=1e-12)
        if not name.startswith("evaluation/"):
            column = series.column(name)
            assert {s: v for s, v in enumerate(column.tolist()) if not math.isnan(v)} == truth
    plain = [e for e in events if e["kind"] != "step"]
    assert [{**mine, **true} for mine, true in zip(series.events, plain, strict=True)] == series.events
    for step in {*taken[:2], *taken[-2:]}:
        assert series.event(step) == next(e for e in events if e["kind"] == "step" and e["step"] == step)


@settings(max_examples=100)
@given(logs(), st.data())
def test_the_columns_say_what_the_events_say(tmp_path_factory, chunks, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", data.draw(st.sampled_from([1, 500, 1 << 18])))
        run = tmp_path_factory.mktemp("run")
        path = run / "events.jsonl"
        path.touch()
        readers = [Series(run)]
        for chunk in chunks:
            torn, chunk = chunk if isinstance(chunk, tuple) else (False, chunk)
            if torn:  # a crash in the middle of a line, seen by a reader, then cut off
                with path.open("ab") as file:
                    file.write(b'{"schema":1,"kind":"st')
                readers[0].update()
                path.write_bytes(path.read_bytes()[: -len(b'{"schema":1,"kind":"st')])
            with path.open("ab") as file:
                file.write(chunk)
            match data.draw(st.integers(0, 3)):
                case 0:
                    readers[0].update()
                case 1:
                    readers.append(Series(run))
        for reader in (*readers, Series(run)):
            reader.update()
            check(reader, path, data.draw(st.sampled_from([4, 10, 500])))


def test_a_bucket_by_hand(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b"".join(line(step_event(step, step)) for step in range(10)))
    series = Series(tmp_path)
    chart = series.read(["control/temperature", "train/none"], points=3)  # buckets of 4: steps 0-3, 4-7, 8-9
    assert chart["step"].tolist() == [1, 5, 8]
    assert chart["control/temperature"]["mean"].tolist() == pytest.approx([1.015, 1.055, 1.085])
    assert chart["control/temperature"]["low"].tolist() == [1.0, 1.04, 1.08]
    assert chart["control/temperature"]["high"].tolist() == [1.03, 1.07, 1.09]
    assert all(math.isnan(value) for value in chart["train/none"]["mean"])
    assert series.read(["control/temperature"], first=2, last=3)["control/temperature"]["mean"].tolist() == [1.02, 1.03]
    assert series.in_state("saturated").tolist() == [step % 3 == 1 for step in range(10)]
    assert series.event(7)["reason"] == "value 7"
    assert (series.event(10), series.event(-1)) == (None, None)


def test_reading_again_reads_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(line(step_event(step, step)) for step in range(100)))
    series = Series(tmp_path)
    parsed = []
    monkeypatch.setattr(events, "parse_event", lambda line: parsed.append(parse_event(line)) or parsed[-1])
    assert series.update() is False
    with path.open("ab") as file:
        file.write(line(step_event(100, 100)))
    assert series.update() is True
    assert [event["step"] for event in parsed] == [100]


def test_another_log_in_its_place_is_noticed(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(line(step_event(step, step)) for step in range(50)))
    series = Series(tmp_path)
    path.write_bytes(b"".join(line(step_event(step, step + 1)) for step in range(60)))
    series.update()
    check(series, path, 10)
    check(Series(tmp_path), path, 10)
    path.write_bytes(line(step_event(0, 3)))
    series.update()
    check(series, path, 10)


def test_a_damaged_line_leaves_a_gap_and_is_counted(tmp_path, caplog):
    path = tmp_path / "events.jsonl"
    path.write_bytes(line(step_event(0, 1)) + b"broken\n" + line(step_event(2, 3)))
    series = Series(tmp_path)
    check(series, path, 10)
    assert series.event(1) is None
    assert math.isnan(series.column("control/temperature")[1])
    assert (series.damage[0], series.damage[1][:20]) == (1, "line 2 is no event: ")
    with path.open("ab") as file:
        file.write(b"{}\n")
    caplog.clear()
    series.update()
    assert series.damage[0] == 2
    assert not caplog.records, "said once"


def test_marks_in_order(tmp_path):
    events = [
        other("evaluation", 0, 9),
        step_event(0, 1),
        other("alert", 0, 2),
        {"kind": "checkpoint", "time": 1.0, "step": 1, "path": "checkpoints/step-1"},
        step_event(1, 3),
        other("alert", 1, 4),  # lost with step 1
        {"kind": "resume", "time": 1.0, "step": 1},
        other("fault", 1, 5),
        step_event(1, 6),
        {
            "kind": "alert",
            "time": 1.0,
            "step": 1,
            "rule": "stall",
            "severity": "critical",
            "reason": "r",
            "state": "end",
        },
        {"kind": "stall", "time": 1.0, "step": 2, "seconds": 700.0},
        {"kind": "run_end", "time": 1.0, "status": "failed", "error": "no"},
    ]
    (tmp_path / "events.jsonl").write_bytes(b"".join(map(line, events)))
    assert [tuple(mark.values()) for mark in Series(tmp_path).marks()] == [
        (0, "evaluation", "pass@1 1.000", "info"),
        (0, "alert", "x: value 2", "warning"),
        (1, "checkpoint", "checkpoints/step-1", "info"),
        (1, "restart", "resumed after 1 step", "info"),
        (1, "fault", "engine 0", "warning"),
        (1, "alert", "stall is over", "info"),
        (2, "stall", "no step for 700 s", "critical"),
        (2, "end", "failed: no", "critical"),
    ]
