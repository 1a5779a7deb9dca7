"""The law card against runs whose plant is known."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.entropy.plant import Plant, Scenario, simulate
from pipeline.monitoring.law_card import GOALS, law_card
from pipeline.monitoring.report import build_report
from pipeline.monitoring.summary import cost_sentences, named, read_run, summarize_run
from pipeline.monitoring.tracking import track
from pipeline.types import EntropyReading, StepSamples, StepStats

sys.path.append(str(Path(__file__).parent))
import run_writer as runs

PLANT = Plant(gain=0.026, drift=-0.009, lag=1, sensor_noise=0.03, process_noise=0.004)


def write_simulated(folder, scenario, *overrides):
    """A run whose entropies and commands are those of the simulated plant."""
    recorder = runs.open_run(folder, "name=pi", *overrides)
    recorder.evaluation(0, runs.evaluation(0.3, 0.9))
    trace = simulate(runs.config(*overrides).entropy, scenario, 0)
    commands = [1.0, *(decision.command for decision in trace.decisions)]
    for step, entropy in enumerate(trace.readings):
        drawn = StepSamples([runs.group(runs.sample(), runs.sample(0.0))], [], 0)
        stats = StepStats(0.0, EntropyReading(entropy * 100, 100.0, step), 1.0, 1e-3, {}, 0.05)
        used = replace(runs.decision(), command=commands[step], temperature=commands[step])
        recorder.step(runs.outcome(step, drawn, stats, used, trace.decisions[step]))
    recorder.evaluation(scenario.steps, runs.evaluation(0.5, 0.9))
    runs.end(recorder)
    recorder._lock.close()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs.write_run(root / "grpo", "name=grpo", "entropy.controller=none", steps=150, final=(0.6, 0.8))
    held = Scenario("held", PLANT, start=0.45, target=0.3, steps=150)
    far = Scenario("far", replace(PLANT, gain=0.004), start=0.4, target=0.3, steps=150)
    return [
        root / "grpo",
        write_simulated(root / "held", held),
        write_simulated(root / "far", far, "entropy.command_min=0.5", "entropy.command_max=2", "seed=1"),
    ]


@pytest.fixture(scope="module")
def cards(folders):
    read = named([read_run(folder) for folder in folders])
    return [law_card(run, read) for run in read]


def numbers(text):
    return [float(number) for number in re.findall(r"[+-]?\d+\.?\d*(?:e-?\d+)?", text)]


def test_a_run_without_control_has_no_card(cards):
    assert cards[0] == {}


def test_the_plant_is_found_within_its_interval(cards):
    gain, low, high, *_ = numbers(cards[1]["Gain b"])
    assert low < PLANT.gain < high
    assert low < gain < high
    drift, low, high = numbers(cards[1]["Drift d"])[:3]
    assert low < PLANT.drift < high
    held = numbers(cards[1]["Command that holds the entropy"])[0]
    assert held == pytest.approx(2.718 ** (-drift / gain), rel=0.02)
    assert "within the limits 1 to 6" in cards[1]["Command that holds the entropy"]
    sensor, policy = numbers(cards[1]["Noise"])
    assert sensor == pytest.approx(100 * PLANT.sensor_noise, rel=0.3)
    assert policy < 2


def test_the_price_is_against_the_run_of_the_same_seed_without_control(cards):
    assert cards[1]["Price"] == (
        "0.0% less training reward than grpo over as many tokens (no interval: one run each); 0.0% more response "
        "tokens a step for its readings and second rollout; pass@1 0.500 [0.45, 0.55] against 0.600 [0.55, 0.65]; "
        "pass@16 0.900 [0.85, 0.95] against 0.800 [0.75, 0.85] (held-out prompts, 95 % intervals; evaluated after 150 "
        "and 150 steps)"
    )
    assert cards[2]["Price"].startswith("reward not known: no run of the same task, without control and with seed 1")


def test_a_run_of_another_task_tells_no_price_and_other_differences_are_named(folders, tmp_path):
    runs.write_run(tmp_path / "cd3", "data.source.task=cd3", "entropy.controller=none", steps=30, final=(0.6, 0.8))
    runs.write_run(tmp_path / "lr", "learner.optimizer.lr=0.1", "entropy.controller=none", steps=30, final=(0.6, 0.8))
    held, other, faster = [read_run(folder) for folder in (folders[1], tmp_path / "cd3", tmp_path / "lr")]
    assert law_card(held, [held, other])["Price"].startswith("reward not known")
    both = [held, other]
    assert cost_sentences(both, [summarize_run(run) for run in both]) == []
    assert "one run each), which differs also in learner.optimizer.lr; 0.0% more" in law_card(held, [faster])["Price"]


def test_what_was_not_reached_is_said(cards):
    assert "the end" not in cards[1]["Not reached"]
    assert re.search(r"^the band|of the steps in band", cards[2]["Not reached"])
    assert re.search(r"\d+ steps at the limit, the last at \d+: .*not reachable", cards[2]["Not reached"])
    assert "at its upper in 0%" not in cards[2]["What the controller did"]
    assert "OUTSIDE the limits 0.5 to 2" in cards[2]["Command that holds the entropy"] or "sign" in cards[2]["Gain b"]


def test_a_command_that_never_moved_tells_no_plant(tmp_path):
    runs.write_run(tmp_path / "run", steps=30)
    card = law_card(read_run(tmp_path / "run"))
    assert "not identified: the command never varied" in card["Plant"]
    assert (card["Drift d"], card["Command that holds the entropy"]) == ("-", "not known")
    goals = [
        "95 % of the steps in band",
        "an RMS error of 5 %",
        "an overshoot of 10 %",
        "20 steps in the band in a row",
    ]
    assert card["Not reached"] == f"nothing (goals: {', '.join(goals)})"
    assert list(GOALS) == goals


def test_each_goal_that_was_missed_is_said_alone():
    met = track(np.full(60, 0.3), np.full(60, 0.27), np.full(60, 0.33))
    assert all(goal(met) for goal in GOALS.values())
    misses = {"time_in_band": 0.94, "rms_error": 0.06, "overshoot": 0.11, "settling_step": None}
    for place, miss in enumerate(misses.items()):
        assert [goal(replace(met, **dict([miss]))) for goal in GOALS.values()] == [i != place for i in range(4)]


def test_a_card_says_what_run_it_is_of_and_what_its_figures_mean(cards):
    held = cards[1]
    assert re.match(
        r"pi, seed 0: 150 steps of \d+, completed; model pm4-100k, 16 prompts x 16 answers and 1 update a ", held["Run"]
    )
    assert "to the step's own readings, intervals 95 %" in held["Plant"]
    gain, drift = numbers(held["Gain b"])[0], numbers(held["Drift d"])[0]
    assert f"(T+ higher by a tenth: {gain * math.log(1.1):+.2%}"[:28] in held["Gain b"]
    steps = int(re.search(r"H halves in (\d+) steps", held["Drift d"])[1])
    assert steps == pytest.approx(math.log(2) / -drift, rel=0.02)
    assert "first reading 0.4" in held["Tracking"]
    assert "crossings of the target per 100 steps" in held["Tracking"]


def test_the_report_has_every_card(folders, tmp_path):
    result = build_report(folders, tmp_path / "report.html")
    assert list(result["law_cards"]) == ["pi, seed 0", "pi, seed 1"] or len(result["law_cards"]) == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count('<dl class="card">') == 2
    assert "<dt>Drift d</dt>" in page
