"""``isentrope entropy`` on run folders, which need no model."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import EntropyConfig
from pipeline.entropy.plant import Plant, Scenario, simulate
from pipeline.types import ControlDecision, EntropyReading, StepSamples, StepStats
from tests.command_line import call

sys.path.append(str(Path(__file__).parents[1] / "pipeline" / "monitoring"))
import run_writer as runs

PLANT = Plant(gain=0.025, drift=-0.009, lag=1, process_noise=0.005, sensor_noise=0.05)


def write_simulated(run_dir, *overrides):
    trace = simulate(EntropyConfig(), Scenario("cli", PLANT, steps=200), seed=1)
    recorder = runs.open_run(run_dir, *overrides)
    for step, (entropy, u) in enumerate(zip(trace.readings, trace.commands, strict=True)):
        used = ControlDecision(float(np.exp(u)), float(np.exp(u)), 0, "tracking", "")
        with recorder.clock()("sample"):
            pass
        reward = 1.0 if np.random.default_rng(step).random() < 1.2 - 0.5 * np.exp(entropy) else 0.0
        stats = StepStats(0.0, EntropyReading(entropy * 100, 100.0, step), 1.0, 1e-3, {}, 0.05)
        drawn = StepSamples([runs.group(runs.sample(reward), runs.sample(reward))], [], 0)
        recorder.step(runs.outcome(step, drawn, stats, used, used))
    runs.end(recorder)
    return run_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_simulated(tmp_path_factory.mktemp("runs") / "pi", "name=pi")


def test_calibrate_reads_the_plant_from_a_log_and_says_what_to_use(capsys, folder):
    code, out, _ = call(capsys, "entropy", "calibrate", str(folder), "--json")
    found = json.loads(out)
    assert code == 0
    low, high = found["plant"]["gain_interval"]
    assert low < 0.025 < high
    code, out, _ = call(capsys, "entropy", "calibrate", str(folder))
    assert out.splitlines()[-1] == f"use: entropy.pi.kp={found['kp']:g} entropy.pi.ki={found['ki']:g}"


def test_a_run_without_control_tells_no_gain(capsys, tmp_path):
    runs.write_run(tmp_path / "grpo", "entropy.controller=none", entropy=runs.collapsing)
    code, _, err = call(capsys, "entropy", "calibrate", str(tmp_path / "grpo"))
    assert code == 1
    assert "use --excite" in err


def test_law_of_a_run_and_its_warning(capsys, folder, tmp_path):
    runs.write_run(tmp_path / "grpo", "entropy.controller=none", entropy=runs.collapsing)
    code, out, _ = call(capsys, "entropy", "law", str(folder), str(tmp_path / "grpo"), "--json")
    controlled, free = json.loads(out)
    assert code == 0
    assert controlled["ceiling_interval"][0] < 0.7 < controlled["ceiling_interval"][1]
    assert (controlled["controlled"], free["controlled"]) == (True, False)
    code, out, _ = call(capsys, "entropy", "law", str(folder), str(tmp_path / "grpo"))
    assert out.count("choose no target by it") == 1
    runs.write_run(
        tmp_path / "short", entropy=lambda step: 0.3 + 0.01 * step, steps=10
    )  # 15 % of it are too few to fit
    code, out, _ = call(capsys, "entropy", "law", str(tmp_path / "short"), "--json")
    assert "NaN" not in out
    assert json.loads(out)[0]["early_error"] is None


def test_a_folder_that_is_no_run_is_one_clear_line(capsys, tmp_path):
    code, _, err = call(capsys, "entropy", "calibrate", str(tmp_path / "none"))
    assert code in (1, 2)
    assert str(tmp_path / "none") in err


def write_evaluated(
    run_dir,
    *overrides,
    finish=True,
    pass_at_16=lambda step: 0.95 - (step / 10 - 2) ** 2 / 40,
    entropy=lambda step: 1.0 - step / 80,
):
    recorder = runs.open_run(run_dir, *overrides)
    for step in range(60):
        if step % 10 == 0:
            recorder.evaluation(step, runs.evaluation(0.3 + step / 150, pass_at_16(step)))
        runs.record_step(recorder, step, entropy(step))
    if finish:
        runs.end(recorder)
    return run_dir


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return write_evaluated(tmp_path_factory.mktemp("runs") / "grpo", "entropy.controller=none", "steps=60")


def test_target_reads_a_band_from_the_fall_of_a_run_without_control(capsys, evaluated):
    run_dir = evaluated
    code, out, _ = call(capsys, "entropy", "target", str(run_dir), "--k", "16")
    assert code == 0
    assert "<- keeps pass@16" in out
    code, out, _ = call(capsys, "entropy", "target", str(run_dir), "--json")
    found = json.loads(out)
    assert (found["k"], found["step"]) == (16, 30)
    assert found["entropy"] == pytest.approx(1.0 - 29.5 / 80)
    assert len(found["points"]) == 6


def test_target_refuses_what_says_nothing(capsys, folder, tmp_path):
    code, _, err = call(capsys, "entropy", "target", str(folder))
    assert code == 2
    assert "entropy.controller=pi held its entropy" in " ".join(err.replace("│", " ").split())
    runs.write_run(tmp_path / "grpo", "entropy.controller=none", entropy=runs.collapsing)
    code, _, err = call(capsys, "entropy", "target", str(tmp_path / "grpo"))
    assert code == 2
    assert (
        "evaluations with pass@16 and an entropy: 2, at least 5 are needed; train one with evaluation.every="
        in said(err)
    )


def said(err):
    """What a box of the command line says, in one line."""
    return " ".join(err.replace("│", " ").split())


def test_target_says_what_to_do_about_a_k_that_was_not_measured(capsys, evaluated):
    code, _, err = call(capsys, "entropy", "target", str(evaluated), "--k", "7")
    assert code == 2
    assert "its evaluations measured pass@k for k = 1, 16: give --k one of these" in said(err)

    code, _, err = call(capsys, "entropy", "target", str(evaluated), "--k", "64")
    assert "train one with evaluation.k=[64] and evaluation.samples=64 or more (it had 32)" in said(err)


def test_target_names_entropies_that_are_not_known_as_the_cause(capsys, tmp_path):
    free = ["entropy.controller=none", "steps=60"]
    write_evaluated(tmp_path / "lost", *free, entropy=lambda step: math.nan)
    code, _, err = call(capsys, "entropy", "target", str(tmp_path / "lost"))
    assert code == 2
    assert "beside 6 of its 6 evaluations every step's entropy is null" in said(err)
    assert "evaluation.every" not in said(err)


def test_the_points_of_a_target_are_those_that_it_is_recommended_from(capsys, tmp_path):
    free = ["entropy.controller=none", "steps=60"]
    write_evaluated(tmp_path / "hole", *free, entropy=lambda step: math.nan if step < 5 else 1.0 - step / 80)
    code, out, _ = call(capsys, "entropy", "target", str(tmp_path / "hole"), "--json")
    found = json.loads(out)
    assert code == 0
    assert [point["step"] for point in found["points"]] == [10, 20, 30, 40, 50]
    assert len(found["smooth"]) == 5
    code, out, _ = call(capsys, "entropy", "target", str(tmp_path / "hole"))
    assert "nan" not in out


def test_no_band_is_recommended_at_an_entropy_of_0(capsys, tmp_path):
    write_evaluated(tmp_path / "spent", "entropy.controller=none", "steps=60", entropy=lambda step: 0.0)
    code, out, err = call(capsys, "entropy", "target", str(tmp_path / "spent"))
    assert code == 2
    assert out == ""
    assert "its entropy is 0 at step 30, the last that kept pass@16, so there is none to hold" in said(err)


def test_target_of_a_run_still_going_says_of_how_many_steps_it_is(capsys, tmp_path):
    run_dir = write_evaluated(tmp_path / "grpo", "entropy.controller=none", "steps=100", finish=False)
    code, out, _ = call(capsys, "entropy", "target", str(run_dir))
    assert code == 0
    assert "the run is unfinished: this is of 60 of its 100 steps" in out
    code, out, _ = call(capsys, "entropy", "target", str(run_dir), "--json")
    found = json.loads(out)
    assert (found["status"], found["steps"], found["pays"]) == ("unfinished", 60, True)
    short = runs.open_run(tmp_path / "short", "entropy.controller=none", "steps=100")
    runs.record_step(short, 0, 1.0)
    short.evaluation(1, runs.evaluation(0.3, 0.9))
    code, _, err = call(capsys, "entropy", "target", str(tmp_path / "short"))
    assert code == 2
    assert "and an entropy: 1, at least 5 are needed; 1 of its 100 steps are done: ask again later" in said(err)


def test_a_band_that_is_not_shown_to_pay_is_not_called_for(capsys, tmp_path):
    run_dir = write_evaluated(tmp_path / "grpo", "entropy.controller=none", "steps=60", pass_at_16=lambda step: 0.9)
    code, out, _ = call(capsys, "entropy", "target", str(run_dir))
    assert code == 0
    assert "use:" not in out
    assert "to hold it all the same: entropy.band.low=" in out
