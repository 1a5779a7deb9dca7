"""A run whose band is of the repeated prompts: everything that is compared with the band reads those, not the step's
own rows.
"""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launchers.lab.figures import measure
from pipeline.monitoring.law_card import law_card
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.report import build_report
from pipeline.monitoring.series import Series
from pipeline.monitoring.status import status_of
from pipeline.monitoring.summary import read_run, summarize_run
from pipeline.monitoring.terminal import view
from pipeline.monitoring.tracking import of_series

sys.path.append(str(Path(__file__).parent))
import run_writer as runs

REPEATED = ("entropy.repeated_prompts=8", "entropy.band_of=repeated")


def write(folder, *overrides, repeated=0.3, own=0.6):
    recorder = runs.open_run(folder, "name=pi", *overrides)
    for step in range(30):
        runs.record_step(recorder, step, own, metrics={"entropy_repeated": repeated})
    recorder._lock.close()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("runs") / "pi", *REPEATED)


def test_tracking_summary_and_the_laboratory(folder):
    run = read_run(folder)
    assert (of_series(run.series).time_in_band, summarize_run(run)["entry_step"]) == (1.0, 0)
    measured = measure(run, None)
    assert (measured["time_in_band"], measured["final_entropy"]) == (1.0, pytest.approx(0.3))
    assert summarize_run(run)["final_entropy"] == pytest.approx(0.3)
    assert run.column("control/in_band").tolist() == [1.0] * 30


def test_the_same_readings_are_outside_the_band_where_it_is_of_the_steps_own_rows(tmp_path):
    run = read_run(write(tmp_path / "step", "entropy.repeated_prompts=8"))
    assert of_series(run.series).entry_step is None
    assert measure(run, None)["final_entropy"] == pytest.approx(0.6)


def test_status_and_terminal(folder):
    found = status_of(Series(folder))
    assert (found["entropy"], found["entropy_controlled"], found["band_of"]) == (0.6, 0.3, "repeated")
    assert found["state"] == "tracking", "not waiting for the step's own rows to come to the band"
    console = Console(file=io.StringIO(), width=80, height=40, legacy_windows=False)
    console.print(view([Series(folder)], console))
    text = console.file.getvalue()
    assert "entropy of the repeated prompts, nats per token" in text
    assert "repeated 0.3" in text


def test_the_line_of_a_live_run(tmp_path, monkeypatch):
    shown = io.StringIO()
    live = Progress("pi", 30, console=Console(file=shown, width=200))
    recorder = runs.open_run(tmp_path / "run", *REPEATED)
    recorder._progress = live
    for step in range(30):
        runs.record_step(recorder, step, 0.6, metrics={"entropy_repeated": 0.3})
    recorder._lock.close()
    assert "entropy at the start: 0.3 nats" in shown.getvalue()
    assert "entropy 0.300 (band 0.270-0.330)" in shown.getvalue()
    assert "waiting" not in shown.getvalue()


def test_a_lost_repeated_sample_is_no_reading(tmp_path):
    run = read_run(write(tmp_path / "lost", *REPEATED, repeated=float("nan")))
    assert of_series(run.series).entry_step is None


def test_the_card_and_the_page_say_whose_entropy_it_is(folder, tmp_path):
    assert "for the repeated prompts, the same at every step" in law_card(read_run(folder))["Band"]
    build_report([folder], tmp_path / "report.html")
    assert "of the repeated prompts: pi" in (tmp_path / "report.html").read_text()
