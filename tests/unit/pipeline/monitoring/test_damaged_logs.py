"""Whatever stands in an event log, its readers go on: what a damaged line cost is a line, never the run."""

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from launchers.supervise.attempts import progress
from pipeline.config.schema import AlertsConfig
from pipeline.monitoring.alerts.engine import AlertEngine, replayed
from pipeline.monitoring.alerts.rules import load_rules
from pipeline.monitoring.event_kinds import DamagedLineError, parse_event
from pipeline.monitoring.events import EventReader, read_events
from pipeline.monitoring.series import Series
from pipeline.monitoring.status import status_of
from pipeline.monitoring.summary import named, read_run, summarize_run
from pipeline.monitoring.terminal import view

sys.path.append(str(Path(__file__).parent))
import resumed_run

RULES = load_rules(AlertsConfig())
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({"a": []})
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    resumed_run.first_attempt(run_dir)
    return resumed_run.second_attempt(run_dir)


@pytest.fixture(scope="module")
def lines(run_dir):
    return (run_dir / "events.jsonl").read_bytes().splitlines()


def damaged(draw, line):
    """A line with bytes changed, or with a field, outer or inner, of another type or gone."""
    if draw(st.booleans()):
        at = draw(st.integers(0, len(line)))
        return line[:at] + draw(st.binary(max_size=3)).replace(b"\n", b"") + line[at + draw(st.integers(0, 3)) :]
    event = json.loads(line)
    inside = draw(st.sampled_from([event, *(value for value in event.values() if isinstance(value, dict) and value)]))
    field = draw(st.sampled_from(sorted(inside)))
    if draw(st.booleans()):
        del inside[field]
    else:
        inside[field] = draw(ODD)
    return json.dumps(event).encode()


@settings(max_examples=60, deadline=None, derandomize=True)  # the same examples every time: CI must not depend on luck
@given(st.data())
def test_every_reader_reads_on(run_dir, lines, data):
    written = list(lines)
    for at in data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=1, max_size=4, unique=True)):
        written[at] = damaged(data.draw, written[at])
    path = run_dir / "events.jsonl"
    path.write_bytes(b"\n".join([*written, b""]))
    reader = EventReader(path)
    assert len(list(reader)) + reader.damaged == len(lines)
    read_events(path)
    progress(run_dir)
    replayed(AlertEngine(RULES), path, 4)
    (run,) = named([read_run(run_dir)])
    json.dumps(summarize_run(run), allow_nan=False)
    series = Series(run_dir)
    series.marks()
    assert status_of(series)["damaged_lines"] == reader.damaged
    Console(file=io.StringIO(), width=80).print(view([series], Console(file=io.StringIO(), width=80)))


@given(st.binary(max_size=60))
def test_bytes_are_an_event_or_refused(line):
    with pytest.raises(DamagedLineError):
        parse_event(line)
