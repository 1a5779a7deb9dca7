"""The report page and the figures behind it."""

import csv
import errno
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.disk import DiskFullError
from pipeline.monitoring import table
from pipeline.monitoring.charts import CHARTS, DARK, svg, theme_variables
from pipeline.monitoring.differences import config_differences, result_differences
from pipeline.monitoring.report import build_report
from pipeline.monitoring.summary import by_method, named, read_run, summarize

sys.path.append(str(Path(__file__).parent))
import run_writer as runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs.write_run(root / "grpo", "name=grpo", "entropy.controller=none", entropy=runs.collapsing, final=(0.55, 0.88))
    runs.write_run(root / "pi", "name=pi", entropy=lambda step: 0.5 if step < 5 else 0.3, final=(0.5, 0.95))
    return [root / "grpo", root / "pi"]


def test_summary_by_hand(folders):
    summary = summarize(folders[1])
    expected = {
        "method": "pi",
        "seed": 0,
        "steps": 30,
        "status": "completed",
        "pass_at_1": 0.5,
        "pass_at_16": 0.95,
        "pass_at_1_interval": [0.45, 0.55],
        "distinct_correct": 3.0,
        "evaluation_step": 30,
        "controller": "pi",
        "actuator": "reweight",
        "restarts": [],
        "entry_step": 13,  # 0.3 + 0.2 * 0.8^k <= 0.33 from k = 9, the ninth step at 0.3
        "time_in_band": 1.0,
        "settling_step": None,  # only 17 steps remain
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["final_entropy"] == pytest.approx(0.3)
    assert summary["tokens"] == {"main": 30 * 8, "auxiliary": 0}
    assert summary["seconds"]["evaluation"] == 4.0
    json.dumps(summary, allow_nan=False)


def test_a_collapsing_baseline_leaves_the_band(folders):
    summary = summarize(folders[0])
    assert summary["actuator"] == "none"
    assert summary["final_entropy"] < 0.2
    assert summary["time_in_band"] < 0.5


@pytest.fixture(scope="module")
def built(folders, tmp_path_factory):
    """What ``build_report`` returned, the page, and the folder it lies in."""
    root = tmp_path_factory.mktemp("report")
    result = build_report(folders, root / "out" / "report.html", root / "report.png")
    return result, (root / "out" / "report.html").read_text(), root


def test_the_page_is_self_contained_and_says_what_was_measured(built):
    result, page, root = built
    assert result["cost"] == [
        "pi: pass@1 0.500 against 0.550 of grpo, a difference of -0.050; pass@16 0.950 against 0.880 "
        "(one seed each; the 95 % intervals of pass@1 overlap), after 30 steps."
    ]
    assert result["cost"][0] in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "<script" not in page
    assert (root / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(root.glob("**/*.partial"))


class Balance(HTMLParser):
    """Every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed(built):
    parser = Balance()
    parser.feed(built[1])
    assert parser.open == []


def test_charts_are_xml_whose_colours_follow_the_theme(built):
    charts = re.findall(r"<svg .*?</svg>", built[1], flags=re.DOTALL)
    assert len(charts) == len(CHARTS)
    for text in charts:
        ElementTree.fromstring(text.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        assert "var(--chart-" in text
        assert not [colour for colour in theme_variables() if colour in text]


def test_every_colour_has_a_dark_partner():
    assert set(DARK) == set(theme_variables())


@pytest.mark.parametrize("steps", [0, 1])
def test_a_running_run_can_be_reported(tmp_path, steps):
    recorder = runs.open_run(tmp_path / "run")
    for step in range(steps):
        runs.record_step(recorder, step)
    result = build_report([tmp_path / "run"], tmp_path / "report.html", tmp_path / "report.png")
    (summary,) = result["runs"]
    assert (summary["status"], summary["steps"], summary["pass_at_1"]) == ("unfinished", steps, None)
    assert summary["pass_at_16_interval"] is None
    assert result["cost"] == []
    assert "<p>Nothing.</p>" in (tmp_path / "report.html").read_text()


def test_engine_against_learner(tmp_path):
    recorder = runs.open_run(tmp_path / "run")
    for step, (mean, largest) in enumerate([(0.001, 0.5), (0.003, 0.25), (math.nan, 0.125)]):
        runs.record_step(recorder, step, metrics={"mismatch_mean": mean, "mismatch_max": largest})
    (summary,) = build_report([tmp_path / "run"], tmp_path / "report.html")["runs"]
    assert summary["mismatch"]["mismatch_mean"] == pytest.approx(0.002)  # of the steps that have one
    assert summary["mismatch"]["mismatch_max"] == 0.5
    assert summary["mismatch"]["correction_weight"] is None
    assert "<td>0.002</td><td>-</td><td>0.5</td>" in (tmp_path / "report.html").read_text()


def test_a_saturated_run_says_so_and_its_text_is_escaped(tmp_path):
    recorder = runs.open_run(tmp_path / "run")
    for step in range(4):
        runs.record_step(recorder, step, 0.5, state="saturated", reason="target not reachable: held at <b>H</b>=0.5")
    build_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    text = "at its limit in 100% of the steps, last at step 3: target not reachable: held at &lt;b&gt;H&lt;/b&gt;=0.5"
    assert text in page
    assert "never entered its band" in page
    assert "<b>H</b>" not in page


def test_a_seed_not_evaluated_yet_is_left_out_of_the_comparison(folders, tmp_path):
    """Of two seeds of pi one has just begun: neither its missing figures nor its number count."""
    recorder = runs.open_run(tmp_path / "begun", "name=pi", "seed=1")
    runs.record_step(recorder, 0)
    result = build_report([*folders, tmp_path / "begun"], tmp_path / "report.html")
    assert result["methods"]["pi"]["runs"] == 2
    assert result["cost"] == [
        "pi: pass@1 0.500 against 0.550 of grpo, a difference of -0.050; pass@16 0.950 against 0.880 "
        "(one seed each; the 95 % intervals of pass@1 overlap), after 30 steps."
    ]


@pytest.mark.parametrize(("actuator", "unit"), [("dcpo", "T+"), ("reweight", "T+"), ("tok", "tok")])
def test_commands_are_called_what_they_are(tmp_path, actuator, unit):
    runs.write_run(tmp_path / "run", "name=pi", f"entropy.actuator={actuator}", steps=2)
    assert f"pi ({unit})" in svg("command", named([read_run(tmp_path / "run")]))


def test_means_over_seeds():
    rows = [{"method": "a", "final_entropy": value, "pass_at_1": None} for value in (0.2, 0.4)]
    for row in rows:
        row.update(time_in_band=1.0, rms_error=None, pass_at_16=0.9, distinct_correct=2.0)
    figures = by_method(rows)["a"]
    assert figures["runs"] == 2
    assert figures["final_entropy"] == pytest.approx(0.3)
    assert figures["final_entropy_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert figures["pass_at_1"] is None


def test_only_what_differs_is_compared(folders):
    configs = [read_run(folder).config for folder in folders]
    assert config_differences(configs) == {"entropy.controller": ["none", "pi"]}
    assert config_differences(configs[:1] * 2) == {}
    configs[1].data.chat_template_kwargs = {"enable_thinking": False}
    assert config_differences(configs[1:2] + configs[:1])["data.chat_template_kwargs"] == [
        "{'enable_thinking': False}",
        "{}",
    ]
    found = result_differences([summarize(folder) for folder in folders])
    assert "steps" not in found
    assert found["pass_at_1"] == [(0.55, None), (0.5, pytest.approx(-0.05))]


def test_the_page_compares_and_tells_what_happened(built, folders):
    page = built[1]
    assert "<td>entropy.controller</td><td>none</td><td>pi</td>" in page
    assert "<td>pass@1</td><td>0.550</td><td>0.500 (-0.050)</td>" in page
    assert "step 30: end, info: completed" in page


def test_restarts_alerts_faults_and_stalls_are_told(tmp_path):
    recorder = runs.open_run(tmp_path / "run")
    for step in range(4):
        runs.record_step(recorder, step)
    recorder.fault("engine 1 was started again")
    recorder.event("stall", step=4, seconds=700.0, factor=20.0, stacks=[], action="restart")
    recorder.event("alert", step=3, rule="reward_drop", severity="critical", reason="reward < 0", state="begin")
    recorder._lock.close()
    runs.record_step(runs.open_run(tmp_path / "run", resumed=True, step=4), 4)
    build_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for line in (
        "step 4: fault, warning: engine 1 was started again",
        "step 4: stall, critical: no step for 700 s",
        "step 3: alert, critical: reward_drop: reward &lt; 0",
        "step 4: restart, info: resumed after 4 steps",
    ):
        assert f"<li>{line}</li>" in page


def test_every_step_as_csv(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "BLOCK", 7)
    build_report(folders, tmp_path / "report.html", csv=tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], int(row["step"])) for row in rows] == [(run, s) for run in ("grpo", "pi") for s in range(30)]
    pi = rows[30:]
    assert [float(row["entropy/mean"]) for row in pi] == [0.5] * 5 + [0.3] * 25
    assert {row["state"] for row in pi} == {"tracking"}
    assert float(pi[-1]["evaluation/pass_at_16"]) == 0.95
    assert pi[0]["evaluation/pass_at_16"] == ""
    assert float(pi[3]["sync/bytes"]) == 2**20


def test_samples_tell_their_mean_entropy_where_it_was_recorded(tmp_path):
    runs.write_run(tmp_path / "run", "name=run", finish=False)
    page = build(tmp_path / "run")
    assert "<th>T</th><th>entropy</th>" in page
    assert "<td>1.000</td><td>0.750</td>" in page  # mean of 0, 0.5, 1 and 1.5
    path = tmp_path / "run" / "samples" / "step-000029.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    episode = {"turns": [[0, 1, "tool_calls"], [2, 3, "stop"]], "stop_reason": "done", "pieces": ["a", "<b>", "c"]}
    episode["log_probs"] = [-1.0, None, -1.0]
    path.write_text("".join(json.dumps(without(line, "entropies") | episode) + "\n" for line in lines))
    page = build(tmp_path / "run")
    assert "<td>1.000</td><td>-</td>" in page
    assert '<b>[1, tool call]</b> a<span class="given">&lt;b&gt;</span><b>[2]</b> c <i>done</i>' in page


def without(line, name):
    return {key: value for key, value in line.items() if key != name}


def build(run_dir):
    build_report([run_dir], run_dir / "report.html")
    return (run_dir / "report.html").read_text()


def test_runs_of_one_name_are_told_apart(tmp_path):
    """Two seeds are one method; two configurations of one name and seed are two, called by their folders."""
    for place, *overrides in (("a", "seed=0"), ("b", "seed=1")):
        runs.write_run(tmp_path / place / "pi", "name=pi", *overrides, steps=2)
    build_report([tmp_path / "a" / "pi", tmp_path / "b" / "pi"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>pi s0</b>" in page
    assert "<b>pi s1</b>" in page
    runs.write_run(tmp_path / "c" / "pi", "name=pi", "learner.optimizer.lr=1e-3", steps=2)
    result = build_report([tmp_path / "a" / "pi", tmp_path / "c" / "pi"], tmp_path / "report.html")
    assert list(result["methods"]) == ["pi s0 (a/pi)", "pi s0 (c/pi)"]
    page = (tmp_path / "report.html").read_text()
    assert "<th></th><th>pi s0 (a/pi)</th><th>pi s0 (c/pi)</th>" in page


def bands_of(root, *runs_with_overrides):
    folders = []
    for number, overrides in enumerate(runs_with_overrides):
        folders.append(root / str(number))
        runs.write_run(folders[-1], f"name=run{number}", *overrides, steps=2)
    chart = svg("entropy", named([read_run(folder) for folder in folders]))
    return sorted(re.findall(r">(target band|band of [^<]*)<", chart))


def test_each_band_is_drawn_and_named(tmp_path):
    low, high = ["entropy.band.low=0.1", "entropy.band.high=0.2"], ["entropy.band.low=0.5", "entropy.band.high=0.6"]
    free = ["entropy.controller=none"]
    assert bands_of(tmp_path / "one", low, low) == ["target band"]
    assert bands_of(tmp_path / "two", low, high, low) == ["band of run0, run2", "band of run1"]
    assert bands_of(tmp_path / "free", low, free) == ["target band"], "the run without control steers to none"


def test_damaged_lines_are_told(tmp_path):
    runs.write_run(tmp_path / "run", steps=2, finish=False)
    with (tmp_path / "run" / "events.jsonl").open("a") as log:
        log.write("<b>broken\n")
    page = build(tmp_path / "run")
    assert "1 damaged line of the log skipped: line 7 is no event" in page


def test_a_full_disk_is_told_and_leaves_no_half_report(folders, tmp_path, monkeypatch):
    def write_half(path, text, **_):
        path.write_bytes(text[:100].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(DiskFullError, match=r"bytes are free; make room, then write the report again$") as error:
        build_report(folders, tmp_path / "report.html")
    assert str(error.value).startswith(f"{tmp_path}: no space left: a write failed")
    assert list(tmp_path.iterdir()) == []
