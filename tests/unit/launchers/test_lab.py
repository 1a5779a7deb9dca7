"""The laboratory: suites, the table's arithmetic, and a real matrix of two tiny runs."""

import errno
import io
import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.lab.figures import differences, half_width, main_table, measure, rows_of
from launchers.lab.matrix import LOG, STOPPING, _last_words, is_complete, run_matrix
from launchers.lab.report import write_report
from launchers.lab.suite import Cell, SuiteConfig, cells, chosen, load_suite, with_starts
from pipeline.config.errors import ConfigError
from pipeline.config.load import PACKAGED, load_config, to_yaml
from pipeline.disk import DiskFullError
from pipeline.methods import all_methods
from pipeline.monitoring.events import EventLog
from pipeline.monitoring.summary import read_run
from tests.command_line import call

KNOWN = {"grpo": ["entropy.controller=none"], "pi": [], "twice": ["entropy.actuator=resample"]}


@pytest.fixture
def history(tmp_path):
    """Makes a run of len(rewards) steps that was evaluated after each."""
    count = itertools.count()

    def make(method="pi", seed=0, rewards=(0.2, 0.4), tokens=(100, 0), pass_at_16=(0.9, 0.8)):
        run_dir = tmp_path / f"history-{next(count)}"
        run_dir.mkdir()
        overrides = [*KNOWN[method], f"seed={seed}", f"name={method}", f"run_dir={run_dir}"]
        (run_dir / "config.yaml").write_text(to_yaml(load_config(Path("recipe/pm4.yaml"), overrides)))
        with EventLog(run_dir / "events.jsonl") as log:
            for step, (reward, share) in enumerate(zip(rewards, pass_at_16, strict=True)):
                figures = {
                    "time": 0.0,
                    "entropy": 0.3,
                    "band_low": 0.27,
                    "band_high": 0.33,
                    "reward": reward,
                    "state": "tracking",
                }
                drawn = dict(zip(("main", "auxiliary"), tokens, strict=True))
                log.append("step", {"step": step, **figures, "tokens": drawn, "seconds": {"total": 2.0}})
                estimate, half = ({"value": v, "low": v, "high": v} for v in (share, share / 2))
                found = {"time": 0.0, "pass_at_k": {"1": half, "16": estimate}, "distinct_correct": 3.0}
                log.append("evaluation", {"step": step + 1, **found})
        return read_run(run_dir)

    return make


def test_figures_of_one_run_by_hand(history):
    baseline = history("grpo", rewards=(0.5, 0.5))
    found = measure(history("twice", rewards=(0.2, 0.4), tokens=(100, 50)), baseline)
    # After step 1 it has 150 tokens and 0.9, after step 2 it has 300 and 0.8; the baseline has 200 in all.
    assert found["pass_at_16"] == pytest.approx(0.9 - 0.1 / 3)
    assert found["extra_tokens"] == pytest.approx(0.5)
    # Over 200 tokens: 150 at 0.2 and 50 at 0.4, against 200 at 0.5.
    assert found["reward_cost"] == pytest.approx((100 - (150 * 0.2 + 50 * 0.4)) / 100)
    assert found["time_in_band"] == 1.0
    assert (found["overshoot"], found["settled"]) == (
        0.0,
        2.0,
    )  # above its target throughout; two steps are none to settle in
    assert found["seconds"] == 4.0
    assert math.isnan(found["reached"])
    assert math.isnan(measure(baseline, baseline)["time_in_band"])
    assert math.isnan(measure(baseline, baseline)["reward_cost"])


def test_the_step_that_reaches_a_pass_at_1(history):
    run = history(rewards=(0.1, 0.1, 0.1), pass_at_16=(0.2, 0.4, 0.8))  # pass@1 is 0.1, 0.2, 0.4 after step 1, 2, 3
    reached = [measure(run, None, reach=reach)["reached"] for reach in (0.05, 0.15, 0.3, 0.5)]
    assert reached == pytest.approx([1, 1.5, 2.5, 3])  # the first evaluation has it; between two; never
    assert "reached at step" in main_table(rows_of({"pi": [run]}, "pi", reach=0.3), "{}")[0]
    assert "reached at step" not in main_table(rows_of({"pi": [run]}, "pi"), "{}")[0]


def test_the_mean_of_the_last_evaluations_within_the_budget(history):
    run = history(rewards=(0.1,) * 4, pass_at_16=(0.1, 0.3, 0.5, 0.9))
    assert measure(run, run, mean_of_last=2)["pass_at_16"] == pytest.approx(0.7)
    assert measure(run, run, 3, mean_of_last=2)["pass_at_16"] == pytest.approx(0.4)  # as if it had stopped there
    # Of 100 tokens a step and 300 in the budget: the evaluations after steps 2 and 3.
    assert measure(run, history("grpo", rewards=(0.1,) * 3, pass_at_16=(0.1,) * 3), mean_of_last=2)[
        "pass_at_16"
    ] == pytest.approx(0.4)
    assert measure(run, run, mean_of_last=9)["pass_at_16"] == pytest.approx(0.45)  # all that there are


def test_the_interval_is_students():
    assert math.isnan(half_width([1.0]))
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))


def test_rows_show_the_baseline_stopped_early_too(history):
    rows = rows_of({"grpo": [history("grpo", seed=s) for s in range(3)]}, "grpo", [1])
    assert [row.method for row in rows] == ["grpo, 1 steps", "grpo"]
    assert rows[0].estimate("pass_at_16")[0] == pytest.approx(0.9)
    assert rows[1].estimate("pass_at_16")[0] == pytest.approx(0.8)


def compared(history, ours, theirs):
    runs = {
        "grpo": [history("grpo", seed, pass_at_16=(0.1, value)) for seed, value in enumerate(theirs)],
        "pi": [history("pi", seed, pass_at_16=(0.1, value)) for seed, value in enumerate(ours)],
    }
    return {row.method: row for row in rows_of(runs, "grpo")}


def test_bold_only_where_the_interval_says_so(history):
    clear = compared(history, [0.91, 0.92, 0.93], [0.81, 0.82, 0.83])
    assert "pass_at_16" in clear["pi"].best
    assert "pass_at_16" not in clear["grpo"].best
    lines = main_table(list(clear.values()), "**{}**")[1]
    assert "**0.920 ± 0.025**" in [cell for line in lines for cell in line]
    noise = compared(history, [0.9, 0.7, 0.95], [0.8, 0.85, 0.8])
    assert not any("pass_at_16" in row.best for row in noise.values())
    assert not any(
        "pass_at_16" in row.best for row in compared(history, [0.9], [0.1]).values()
    )  # one seed proves nothing


def test_the_second_table_is_paired_by_seed(history):
    rows = compared(history, [0.9, 0.8, 0.7], [0.8, 0.6, 0.6])
    heading, lines = differences(list(rows.values()), "grpo")
    assert heading == ["method", "seeds", "pass@1", "pass@16", "distinct answers"]
    # .1, .2, .1: their mean, and 4.303 x .0577 / sqrt(3); pass@1 is half of pass@16
    assert lines == [["pi", "3", "+0.067 ± 0.072", "+0.133 ± 0.143", "+0.000 ± 0.000"]]
    assert differences(list(compared(history, [0.9], [0.8]).values()), "grpo")[1] == []  # one seed: nothing to pair


def test_seeds_are_paired_by_their_number(history):
    runs = {
        "grpo": [history("grpo", seed, pass_at_16=(0, value)) for seed, value in enumerate([0.5, 0.6, 0.9])],
        "pi": [history("pi", seed, pass_at_16=(0, value)) for seed, value in ((1, 0.61), (2, 0.91), (0, 0.51))],
    }
    assert "pass_at_16" in {row.method: row for row in rows_of(runs, "grpo")}["pi"].best


def test_cells_are_named_by_what_they_compute(tmp_path):
    suite = SuiteConfig(base="recipe/pm4.yaml", methods=["grpo", "pi"], seeds=2)
    matrix = cells(suite, KNOWN, tmp_path)
    assert [(cell.method, cell.seed) for cell in matrix] == [("grpo", 0), ("pi", 0), ("grpo", 1), ("pi", 1)]
    longer = cells(SuiteConfig(base="recipe/pm4.yaml", methods=["pi"], overrides=["steps=7"]), KNOWN, tmp_path)[0]
    assert len({cell.config.run_dir for cell in [*matrix, longer]}) == 5
    assert longer.config.steps == 7
    with pytest.raises(ConfigError, match=r"steps: 'x'   \(suite, method pi\)"):
        cells(SuiteConfig(base="recipe/pm4.yaml", methods=["pi"], overrides=["steps=x"]), KNOWN, tmp_path)


@pytest.mark.parametrize(
    ("methods", "seeds", "said"),
    [(["grpp"], None, "did you mean 'grpo'"), ([], 0, "seeds: 0(?s:.)*at least 1"), (["pi", "pi"], 1, "")],
)
def test_a_choice_is_checked_and_keeps_the_baseline(methods, seeds, said):
    suite = SuiteConfig(base="recipe/pm4.yaml", methods=["grpo"])
    if said:
        with pytest.raises(ConfigError, match=said):
            chosen(suite, methods, seeds, KNOWN)
    else:
        assert chosen(suite, methods, seeds, KNOWN).methods == ["grpo", "pi"]


def test_a_suite_is_strict(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("base: recipe/pm4.yaml\nmethod: [grpo]\n")
    with pytest.raises(ConfigError, match="did you mean methods"):
        load_suite(str(path), KNOWN)


def test_variants_are_methods_with_more_said(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "base: recipe/pm4.yaml\nmethods: [grpo, more]\nvariants: {more: [twice, entropy.auxiliary_prompts=8]}\n"
    )
    _, more = cells(chosen(load_suite(str(path), KNOWN), [], 1, KNOWN), KNOWN, tmp_path)
    assert (more.method, more.config.entropy.actuator, more.config.entropy.auxiliary_prompts) == ("more", "resample", 8)


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ("{grpo: [pi]}", r"variants.grpo: (?s:.)*is the name of a method"),
        ("{more: pi}", r"variants.more: 'pi'(?s:.)*not a list of texts"),
        ("{more: []}", "not a list of texts"),
        ("{more: [py, steps=3]}", "variants.more: 'py'(?s:.)*did you mean 'pi'"),
    ],
)
def test_variants_are_checked(tmp_path, variants, said):
    path = tmp_path / "s.yaml"
    path.write_text(f"base: recipe/pm4.yaml\nmethods: [grpo]\nvariants: {variants}\n")
    with pytest.raises(ConfigError, match=said):
        load_suite(str(path), KNOWN)


@pytest.mark.parametrize("word", ["seed=5", "name=other", "run_dir=elsewhere", "seed =5"])
def test_a_suite_gives_no_run_its_seed_name_or_folder(capsys, tmp_path, word):
    """They would be silently replaced: the variant would be a copy of its method under another name."""
    path = tmp_path / "s.yaml"
    text = f"base: recipe/pm4.yaml\nmethods: [grpo]\nvariants: {{more: [grpo, steps=3, {word}]}}\n"
    path.write_text(text)
    code, _, err = call(capsys, "lab", "run", "--suite", str(path), "--out", str(tmp_path / "lab"))
    assert code == 2
    assert f"variants.more: '{word}'   ({path})" in err
    assert "has no effect" in err
    assert "remedy:  take it out: " in err
    assert not (tmp_path / "lab").exists()
    path.write_text(f"base: recipe/pm4.yaml\nmethods: [grpo]\noverrides: [steps=3, {word}]\n")
    with pytest.raises(ConfigError, match=f"overrides: '{word}'"):
        load_suite(str(path), KNOWN)


def test_a_suite_without_a_base_is_named(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("methods: [grpo]\n")
    with pytest.raises(ConfigError) as error:
        load_suite(str(path), KNOWN)
    assert f"base: None   ({path})" in str(error.value)


def test_a_matrix_runs_once_and_reports(tmp_path):
    common = [
        "steps=2",
        "runtime=inline",
        "learner.tensor_model_parallel_size=1",
        "monitoring.progress=false",
        "evaluation.at_start=false",
        "evaluation.prompts=4",
        "evaluation.samples=16",
    ]
    suite = SuiteConfig(base="recipe/pm4.yaml", overrides=common, methods=["grpo", "pi"], seeds=1)
    known = {"grpo": KNOWN["grpo"], "pi": ["data.verifier=tests_nowhere:no"]}
    matrix = cells(suite, known, tmp_path)
    outcomes = run_matrix(matrix, 1, lambda outcome: None)
    assert {o.cell.method: o.computed and not o.error for o in outcomes} == {"grpo": True, "pi": False}
    assert "tests_nowhere" in next(o.error for o in outcomes if o.error)
    log = Path(matrix[1].config.run_dir) / LOG
    log.write_text("loaded\nconfiguration error\n  steps: 0\n    problem: out of range\n    remedy:  give 1\n")
    assert (
        _last_words(log, 2)
        == f"exit code 2: configuration error; steps: 0; problem: out of range; remedy: give 1 ({log})"
    )
    log.write_text(
        "WARNING slow\nerror: RuntimeError: rank 1 said:\nthe cause\n  at x\n(run again with --debug to see where)\n"
    )
    assert _last_words(log, 1) == f"exit code 1: error: RuntimeError: rank 1 said:; the cause; at x ({log})"
    log.write_text("error: ModuleNotFoundError: No module named 'ray'\n(pip install 'isentrope[x]')\n")
    assert _last_words(log, 1).endswith(f"'ray'; (pip install 'isentrope[x]') ({log})")
    assert [is_complete(Path(cell.config.run_dir)) for cell in matrix] == [True, False]
    again = run_matrix(matrix[:1], 1, lambda outcome: None)
    assert [o.computed for o in again] == [False]
    result = write_report(suite, matrix, outcomes, tmp_path)
    assert [row["method"] for row in result["rows"]] == ["grpo"]
    assert [f["method"] for f in result["failed"]] == ["pi"]
    assert json.loads((tmp_path / "lab.json").read_text()) == json.loads(json.dumps(result))
    page = (tmp_path / "lab.html").read_text()
    assert "tests_nowhere" in page
    assert "not in the table:\n\n- pi, seed 0: exit code 2: " in (tmp_path / "lab.md").read_text()
    assert "<svg" in page
    for picture in ("lab.png", "lab_price.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"


def test_the_report_has_the_second_table_from_two_seeds_on(history, tmp_path, monkeypatch):
    monkeypatch.setattr("launchers.lab.report.is_complete", lambda run: True)
    suite = SuiteConfig(base="recipe/pm4.yaml", methods=["grpo", "pi"], seeds=2, mean_of_last=2)
    runs = [
        history(method, seed, pass_at_16=(0.4, at)) for seed in (0, 1) for method, at in (("grpo", 0.6), ("pi", 0.8))
    ]
    write_report(suite, [Cell(run.config.name, run.config.seed, run.config) for run in runs], [], tmp_path)
    assert "| pi | 2 | +0.050 ± 0.000 | +0.100 ± 0.000 | +0.000 ± 0.000 |" in (tmp_path / "lab.md").read_text()
    page = (tmp_path / "lab.html").read_text()
    assert "Difference to grpo, by seed" in page
    assert "the mean of the last 2 evaluations" in page


def test_who_reads_a_report_while_it_is_written_again_has_the_one_before(history, tmp_path, monkeypatch):
    monkeypatch.setattr("launchers.lab.report.is_complete", lambda run: True)
    run, out, before = history("grpo", 0), tmp_path / "lab", tmp_path / "before"
    suite = SuiteConfig(base="recipe/pm4.yaml", methods=["grpo"], seeds=1)
    for folder in (out, before):
        folder.mkdir()
    write_report(suite, [Cell("grpo", 0, run.config)], [], out)
    for path in out.iterdir():
        (before / path.name).hardlink_to(path)
    write_report(suite, [Cell("grpo", 0, run.config)], [], out)
    assert {path.name for path in out.iterdir()} == {path.name for path in before.iterdir()}
    assert len(list(out.iterdir())) == 5
    assert not any(path.samefile(before / path.name) for path in out.iterdir())


def test_runs_start_where_others_ended(tmp_path, monkeypatch):
    """A start is run once, before what needs it; its last model is written once; its failure is named."""
    suite = SuiteConfig(
        base="recipe/pm4.yaml",
        overrides=["data.source.task=pm3", "steps=3"],
        methods=["fresh", "after", "again"],
        variants={"fresh": ["grpo"], "after": ["grpo"], "again": ["pi"]},
        baseline="fresh",
        first="anneal",
        after={"after": "grpo", "again": "grpo"},
        seeds=1,
    )
    known = {name: method.overrides for name, method in all_methods().items() if not method.missing} | KNOWN
    matrix = cells(suite, known, tmp_path)
    fresh, after, again = matrix
    assert fresh.start is None
    assert (after.start.config.steps, after.start.config.data.source.task) == (480, "pm4")
    assert after.config.model.hf_path == again.config.model.hf_path == f"{after.start.config.run_dir}/hf"
    assert with_starts(matrix) == [after.start, fresh, after, again]
    elsewhere = cells(suite, known, tmp_path / "x")
    assert [Path(c.config.run_dir).name for c in elsewhere] == [Path(c.config.run_dir).name for c in matrix]

    said, ended = [], []

    def command(words, log, signals):
        said.append(words[0])
        if words[0] == "train":
            ended.append(Path(words[-1]).parent)
        if words[0] == "convert":
            Path(words[-1]).mkdir()
        return ""

    monkeypatch.setattr("launchers.lab.matrix._isentrope", command)
    monkeypatch.setattr("launchers.lab.matrix.is_complete", lambda run_dir: run_dir in ended)
    assert not [o.error for o in run_matrix(matrix, 3, lambda outcome: None) if o.error]
    assert (said.count("train"), said.count("convert")) == (4, 1)
    ended.clear()
    monkeypatch.setattr("launchers.lab.matrix._isentrope", lambda words, log, signals: "")  # stopped, it ends well
    errors = {o.cell.method: o.error for o in run_matrix([after], 1, lambda outcome: None)}
    stopped = "it was stopped before its last step"
    assert errors == {"grpo": stopped, "after": f"what it starts from is missing: {stopped}"}


@pytest.fixture
def small(tmp_path):
    """Words of `isentrope lab run` for two methods and one seed, one run at a time, and its folder."""
    path = tmp_path / "s.yaml"
    path.write_text("base: recipe/pm4.yaml\nmethods: [grpo, gspo]\nseeds: 1\n")
    return ["lab", "run", "--suite", path, "--workers", "1", "--out", tmp_path / "lab"], tmp_path / "lab"


def child(monkeypatch, program):
    """Replace every command that the laboratory runs by a Python program."""
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda command, **more: popen([sys.executable, "-c", program], **more))


# Ends well on a signal, as `isentrope train` does once it has saved.
SAVES = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
# Ctrl-C finds it before it can save: no handler yet.
INTERRUPTED = """
import os, signal
os.kill(os.getppid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("program", [SAVES, INTERRUPTED], ids=["SIGTERM", "ctrl-C"])
def test_a_signal_ends_the_runs_in_progress_and_starts_no_other(capsys, caplog, monkeypatch, small, program):
    """SIGTERM goes to the laboratory alone and is handed on; ctrl-C its runs hear by themselves."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    words, out = small
    child(monkeypatch, program)
    code, printed, err = call(capsys, *words)
    assert (code, printed) == (130, "")
    assert err.splitlines()[-1] == "stopped: 0 of 2 runs are complete; go on with the same command"
    assert STOPPING in caplog.text
    assert [run.name.split("-")[0] for run in out.iterdir()] == ["grpo"], "the second run was not started"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_without_a_run_of_the_baseline_the_failures_are_told(capsys, monkeypatch, small):
    words, out = small
    child(monkeypatch, "raise SystemExit('error: RuntimeError: [Errno 28] No space left on device')")
    code, _, err = call(capsys, *words)
    assert code == 1
    lost = err.split("Failed:\n\n")[1].splitlines()
    assert [line.split(":")[0] for line in lost[:2]] == ["- grpo, seed 0", "- gspo, seed 0"]
    assert "exit code 1: error: RuntimeError: [Errno 28] No space left" in lost[0]
    assert lost[3].startswith("no run of the baseline 'grpo' is complete: ")
    assert lost[3].endswith("mend what failed, then start again to resume the runs")
    assert not (out / "lab.md").exists()


@pytest.mark.parametrize("name", ["mkdir", "write_text"])
def test_a_full_disk_is_told(capsys, monkeypatch, small, name):
    words, out = small
    real = getattr(Path, name)

    def failing(path, *arguments, **more):
        if path.is_relative_to(out):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, name, failing)
    with pytest.raises(DiskFullError, match=rf"^{out}: no space left: .* bytes are free; make room, then start again$"):
        call(capsys, *words)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("after: {grpo: grpo}", r"first(?s:.)*`after` needs it"),
        ("first: anneal\nafter: {grpo: grpp}", r"after.grpo: 'grpp'(?s:.)*did you mean 'grpo'"),
        ("first: anneal\nafter: {grpp: grpo}", r"after.grpp: 'grpp'(?s:.)*did you mean 'grpo'"),
    ],
)
def test_starts_are_checked(tmp_path, lines, said):
    path = tmp_path / "s.yaml"
    path.write_text(f"base: recipe/pm4.yaml\nmethods: [grpo]\n{lines}\n")
    known = {name: method.overrides for name, method in all_methods().items() if not method.missing}
    with pytest.raises(ConfigError, match=said):
        load_suite(str(path), known)


def test_a_long_suite_says_how_long_and_is_not_started_unasked(capsys, tmp_path, monkeypatch):
    """Whoever cannot be asked must name the suite; what it would take is said before."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("sys.stdin", io.StringIO())
    out = tmp_path / "lab"
    code, _, err = call(capsys, "lab", "run", "--out", str(out))
    assert code == 2
    assert "111 runs, 2 at a time; about 56.0 min" in err
    assert "--suite small" in err
    assert not out.exists()


def test_a_proposed_suite_may_be_declined(capsys, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    code, _, err = call(capsys, "lab", "run", "--out", str(tmp_path / "lab"))
    assert code == 0
    assert "Run it?" in err
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("suite", [path.stem for path in sorted((PACKAGED / "lab").glob("*.yaml"))])
def test_every_packaged_suite_says_how_long_a_run_takes(suite):
    known = {name: method.overrides for name, method in all_methods().items() if not method.missing}
    assert load_suite(suite, known).minutes_per_run > 0
