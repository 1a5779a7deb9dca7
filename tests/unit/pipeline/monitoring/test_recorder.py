"""What the recorder puts into a run folder."""

import io
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.checkpoints import Checkpoint
from pipeline.clock import StepClock
from pipeline.config.errors import ConfigError
from pipeline.config.load import config_hash, load_config, resolve_path
from pipeline.data.tokenizer import load_tokenizer
from pipeline.monitoring.events import read_events
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.recorder import Recorder
from pipeline.monitoring.samples import write_samples
from pipeline.monitoring.step_record import episode_figures, rollout_figures
from pipeline.types import KeptSample, Role, StepSamples, Turn, WeightSpan

sys.path.append(str(Path(__file__).parent))
import run_writer as runs


def kinds(run_dir):
    return [event["kind"] for event in read_events(run_dir / "events.jsonl")]


def test_a_run_folder(tmp_path):
    summary = runs.write_run(tmp_path / "run", "name=mine", steps=3, finish=False).finish(completed=True)
    run = tmp_path / "run"
    assert kinds(run) == ["run_start", "evaluation", "step", "step", "step", "evaluation", "checkpoint", "run_end"]
    start = read_events(run / "events.jsonl")[0]
    assert start["prompts"] == {"train": 1, "held_out": 0, "dropped_too_long": 3}
    assert "torch" in start["versions"]
    saved = load_config(run / "config.yaml")
    assert saved == runs.config("name=mine")
    assert start["config_hash"] == config_hash(saved)
    assert config_hash(saved) in (run / "config.yaml").read_text().splitlines()[0]
    assert (run / "report.html").is_file()
    assert (summary["method"], summary["steps"], summary["status"]) == ("mine", 3, "completed")


def test_a_folder_that_cannot_be_made_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"run_dir: '/proc/run'\n.*cannot be made: .*\n.*choose another run_dir"):
        runs.open_run(Path("/proc/run"))


def test_a_second_run_does_not_write_into_the_first(tmp_path):
    runs.open_run(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        runs.open_run(tmp_path)


def test_resume_marks_the_step_and_supersedes(tmp_path):
    runs.write_run(tmp_path, steps=4, finish=False)
    recorder = runs.open_run(tmp_path, resumed=True, step=2)
    runs.record_step(recorder, 2, entropy=0.9)
    recorder.finish(completed=False)
    events = read_events(tmp_path / "events.jsonl")
    steps = [(event["step"], event["entropy"]) for event in events if event["kind"] == "step"]
    assert steps == [(0, 0.3), (1, 0.3), (2, 0.9)]
    assert [event["step"] for event in events if event["kind"] == "resume"] == [2]
    assert [event["status"] for event in events if event["kind"] == "run_end"] == ["stopped"]


def test_a_failure_is_the_last_event(tmp_path):
    recorder = runs.open_run(tmp_path)
    runs.record_step(recorder, 0)
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError("boom")
    last = read_events(tmp_path / "events.jsonl")[-1]
    assert (last["kind"], last["status"], last["error"]) == ("run_end", "failed", "ZeroDivisionError: boom")


def alerts_of(run_dir):
    events = [event for event in read_events(run_dir / "events.jsonl") if event["kind"] == "alert"]
    return [(event["step"], event["rule"], event["state"]) for event in events]


def test_alerts_begin_and_end_once(tmp_path, caplog):
    recorder = runs.open_run(tmp_path)
    for step in range(40):
        if step < 12:
            runs.record_step(recorder, step, state="saturated", reason=f"target not reachable: step {step}")
        else:
            runs.record_step(recorder, step, state="exploding" if step == 12 else "tracking")
    assert alerts_of(tmp_path) == [
        (9, "not_reachable", "begin"),  # 10 steps in a row
        (12, "exploding", "begin"),
        (22, "exploding", "end"),  # 10 steps without
        (31, "not_reachable", "end"),  # 20 steps without
    ]
    first = next(event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "alert")
    assert first["severity"] == "critical"
    assert first["reason"].startswith("target not reachable: step 9. Remedy: the actuator is too weak")
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 4
    assert "alert begin, step 9: not_reachable: target not reachable" in caplog.text


def test_an_alert_outlives_the_process_that_raised_it(tmp_path):
    runs.write_run(tmp_path, steps=12, state="exploding", finish=False)  # checkpoint 12: the alert is in force
    recorder = runs.open_run(tmp_path, resumed=True, step=12)
    for step in range(12, 30):
        runs.record_step(recorder, step)
    assert alerts_of(tmp_path) == [(0, "exploding", "begin"), (21, "exploding", "end")]


@pytest.mark.parametrize("damaged", ["no event", '{"schema": null}', '{"schema": 1, "time": 1}', "[" * 100_000])
def test_a_damaged_line_stops_no_resume_and_costs_no_alert(tmp_path, caplog, damaged):
    recorder = runs.open_run(tmp_path)
    runs.record_step(recorder, 0, state="exploding")
    recorder._lock.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(damaged + "\n")
    runs.record_step(runs.open_run(tmp_path, resumed=True, step=1), 1, state="exploding")
    assert "is no event" in caplog.text
    assert alerts_of(tmp_path) == [(0, "exploding", "begin")], "told once, not again after the resume"


def test_time_alone_raises_an_alert(tmp_path):
    recorder = runs.open_run(tmp_path)
    runs.record_step(recorder, 0)
    recorder.tick(time.time() + 60)
    assert alerts_of(tmp_path) == []
    recorder.tick(time.time() + 600)
    runs.record_step(recorder, 1)
    assert alerts_of(tmp_path) == [(1, "slow_step", "begin"), (1, "slow_step", "end")]


def test_a_rule_that_does_not_exist_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="did you mean reward_drop"):
        runs.open_run(tmp_path, "monitoring.alerts.off=[reward_dorp]")
    assert not (tmp_path / "events.jsonl").exists()


def test_rollout_figures_by_hand():
    main = [
        runs.group(runs.sample(1.0, tokens=2), runs.sample(1.0, tokens=4)),
        runs.group(runs.sample(1.0, tokens=6, finish="length"), runs.sample(0.0, tokens=8, error="timeout")),
        runs.group(),
    ]
    auxiliary = [runs.group(runs.sample(0.0, tokens=5, role=Role.AUXILIARY, error="timeout"), role=Role.AUXILIARY)]
    assert rollout_figures(StepSamples(main, auxiliary, 0)) == {
        "reward": 0.75,
        "all_equal_groups": 0.5,
        "response_length": 5.0,
        "truncated": 0.25,
        "verifier_errors": 2,
        "unjudged": 0.4,
        "prefix_cache": {},
        "tokens": {"main": 20, "auxiliary": 5},
    }


def test_hits_of_the_prefix_cache_by_hand():
    """A single answer behind a prompt, and an episode of two turns."""
    single, episode = runs.sample(1.0, tokens=2), runs.sample(1.0, tokens=9)
    episode = replace(episode, turns=(Turn(0, 3, "stop"), Turn(5, 9, "stop")), cached_tokens=4)
    groups = [runs.group(replace(single, cached_tokens=1)), runs.group(episode, role=Role.AUXILIARY)]
    prompt = len(groups[0].prompt.token_ids)
    read = prompt + (prompt + 0) + (prompt + 5)
    found = rollout_figures(StepSamples(groups[:1], groups[1:], 0))["prefix_cache"]
    assert found == {"read": read, "cached": 5, "share": 5 / read}


def test_figures_of_episodes_by_hand():
    one, other = runs.sample(1.0, tokens=6), runs.sample(0.0, tokens=4)
    drawn = np.array([True, False, False, True, True, True])
    turns = (Turn(0, 1, "stop"), Turn(3, 6, "stop"))
    one = replace(one, drawn=drawn, turns=turns, stop_reason="done", dropped_tokens=3)
    other = replace(other, turns=(Turn(0, 4, "length"),), stop_reason="turn_limit")
    assert episode_figures(StepSamples([runs.group(one, other)], [], 0)) == {
        "turns": 1.5,
        "given_tokens": 1.0,
        "dropped_tokens": 1.5,
        "done": 0.5,
        "turn_limit": 0.5,
    }
    assert episode_figures(StepSamples([runs.group(runs.sample(1.0))], [], 0)) == {}


def test_a_step_without_samples_is_recorded(tmp_path):
    recorder = runs.open_run(tmp_path)
    runs.record_step(recorder, 0, main=[])
    (step,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "step"]
    assert step["reward"] is None


def test_samples_hold_every_token_with_its_log_prob_and_entropy(tmp_path):
    tokenizer = load_tokenizer(resolve_path("model/pm4-100k"))
    drawn = replace(runs.sample(), token_ids=np.array([1, 10, 2, 15]), log_probs=np.log([0.5, 0.25, 0.9, 1.0]))
    entropies = np.log([2.0, 4.0, 1.5, 1.0])
    write_samples(tmp_path, 12, [KeptSample(runs.PROMPT, drawn, entropies)], tokenizer)
    line = json.loads((tmp_path / "step-000012.jsonl").read_text())
    assert (line["step"], line["prompt"], line["weight_versions"]) == (12, "1234>10=", [[0, 0, 4]])
    assert line["pieces"] == ["1", "+", "2", "$"]
    assert line["log_probs"] == [-0.693, -1.386, -0.105, 0.0]
    assert line["entropies"] == [0.693, 1.386, 0.405, 0.0]
    assert line["extracted"] == "1+2+3+4"


def test_what_a_client_said_first_is_the_prompt_of_its_episode(tmp_path):
    """As of an OpenEnv server, whose prompts are numbers until it is reset."""
    tokenizer = load_tokenizer(resolve_path("model/pm4-100k"))
    mask = np.array([False, False, True, False, True])
    played = replace(runs.sample(), token_ids=np.array([1, 10, 2, 10, 15]), log_probs=np.log([1, 1, 0.5, 1, 0.25]))
    played = replace(played, drawn=mask, turns=(Turn(2, 3, "length"), Turn(4, 5, "stop")), stop_reason="done")
    played = replace(played, weight_versions=(WeightSpan(7, 2, 5),))
    write_samples(tmp_path, 1, [KeptSample(replace(runs.PROMPT, token_ids=()), played, None)], tokenizer)
    line = json.loads((tmp_path / "step-000001.jsonl").read_text())
    assert (line["prompt"], line["pieces"]) == ("1+", ["2", "+", "$"])
    assert (line["log_probs"], line["weight_versions"]) == ([-0.693, None, -1.386], [[7, 0, 3]])
    assert line["turns"] == [[0, 1, "length"], [2, 3, "stop"]]


def test_samples_say_what_the_verifier_took_for_the_answer(tmp_path):
    """Without its libraries: math-verify takes a second to import."""
    said = [r"so \boxed{12}", r"so \boxed{", "The answer is (B).", "<think>9</think> 12 "]
    for verifier, text, found in zip(("math", "math", "choice", "exact"), said, ("12", None, "B", "12"), strict=True):
        kept = KeptSample(replace(runs.PROMPT, verifier=verifier), replace(runs.sample(), text=text), None)
        write_samples(tmp_path, 1, [kept], None)
        assert json.loads((tmp_path / "step-000001.jsonl").read_text())["extracted"] == found
    cut = replace(runs.sample(), text=said[0], finish_reason="abort")
    write_samples(tmp_path, 1, [KeptSample(replace(runs.PROMPT, verifier="math"), cut, None)], None)
    assert json.loads((tmp_path / "step-000001.jsonl").read_text())["extracted"] is None


def test_the_clock_accounts_for_every_second():
    clock = StepClock()
    with clock("sample"):
        time.sleep(0.02)
    with clock("train"):
        time.sleep(0.01)
    with clock("sample"):
        time.sleep(0.01)
    seconds = clock.seconds(outside=1.0)
    assert 0.03 <= seconds["sample"] < seconds["total"] - 1.0
    assert seconds["other"] >= 1.0
    assert seconds["total"] == pytest.approx(sum(seconds[p] for p in ("sample", "train", "other")))


@pytest.mark.parametrize(("broken", "said"), [("/dev/full", "No space left"), ("/proc/self/mem", "Input/output error")])
def test_samples_that_cannot_be_written_end_no_run(tmp_path, caplog, broken, said):
    recorder = runs.open_run(tmp_path)
    file = tmp_path / "samples" / "step-000000.jsonl"
    file.symlink_to(broken)
    for step in range(2):
        runs.record_step(recorder, step)
    assert f"{file}: the samples of this step are not kept" in caplog.text
    assert said in caplog.text
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000001.jsonl"]
    assert kinds(tmp_path)[-2:] == ["step", "step"]


def killed_before_its_event(run_dir):
    """A run whose process was killed when checkpoint 8 was published and its event not yet written."""
    words = ["checkpoint.every=4", "monitoring.progress=false"]
    recorder = runs.open_run(run_dir, *words)
    for step in range(8):
        runs.record_step(recorder, step)
        if step == 3:
            recorder.checkpoint(Checkpoint(4, run_dir / "checkpoints/step-00000004"))
    recorder._lock.close()
    return Recorder(run_dir, runs.config(*words), resumed=True)


def test_a_checkpoint_that_a_kill_kept_from_being_logged_is_logged_by_the_resume(tmp_path):
    recorder = killed_before_its_event(tmp_path)
    recorder.start(8, Checkpoint(8, tmp_path / "checkpoints/step-00000008"))
    for step in range(8, 11):
        runs.record_step(recorder, step)
    events = read_events(tmp_path / "events.jsonl")
    saved = [(event["step"], event["path"]) for event in events if event["kind"] == "checkpoint"]
    assert saved == [(4, "checkpoints/step-00000004"), (8, "checkpoints/step-00000008")]
    assert alerts_of(tmp_path) == [], "7 steps were not lost: 3 are"


def test_a_checkpoint_that_was_logged_is_not_logged_again(tmp_path):
    runs.write_run(tmp_path, steps=2, finish=False)
    recorder = Recorder(tmp_path, runs.config(), resumed=True)
    recorder.start(2, Checkpoint(2, tmp_path / "checkpoints/step-00000002"))
    assert (tmp_path / "events.jsonl").read_text().count('"kind":"checkpoint"') == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_the_end(tmp_path, terminal):
    recorder = runs.open_run(tmp_path)
    output = io.StringIO()
    recorder._progress = Progress("mine", 400, console=Console(file=output, force_terminal=terminal, width=120))
    for step in range(399):
        runs.record_step(recorder, step)
    runs.record_step(recorder, 399, state="holding", reason="no positives for 3 steps")
    recorder._progress.close()
    assert "step 400/400" in output.getvalue()
    assert "T+ 1.20 (reweight)" in output.getvalue()
    assert "entropy at the start: 0." in output.getvalue()
    assert "no positives for 3 steps" in output.getvalue()
    if not terminal:
        assert output.getvalue().count("\n") == 20 + 3  # of the note after the first step


def test_attempts_are_counted_and_a_fault_knows_its_step(tmp_path):
    runs.write_run(tmp_path, steps=4, finish=False)
    recorder = runs.open_run(tmp_path, resumed=True, step=2)
    recorder.fault("engine 0 was started again")
    runs.record_step(recorder, 2)
    events = read_events(tmp_path / "events.jsonl")
    starts = [event for event in events if event["kind"] in ("run_start", "resume")]
    assert [event["attempt"] for event in starts] == [1, 2]
    assert {event["host"] for event in starts} == {platform.node()}
    assert [event["step"] for event in events if event["kind"] == "fault"] == [2]


def test_a_step_tells_of_sync_memory_and_engines(tmp_path):
    recorder = runs.open_run(tmp_path)
    runs.record_step(recorder, 0)
    (step,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "step"]
    assert (step["sync"], step["engines"]) == (runs.ROLLOUTS["sync"], runs.ROLLOUTS["engines"])
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert step["memory"] == {"driver": pytest.approx(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, rel=0.2)}


def test_a_band_that_a_run_finds_is_recorded_and_said(tmp_path):
    recorder = runs.open_run(tmp_path / "run", "name=auto")
    console = io.StringIO()
    recorder._progress = Progress("auto", 9, console=Console(file=console, width=300))
    recorder.band(0, (0.27, 0.33), "pass@16 is kept down to H=0.3")
    recorder.finish(completed=False)
    (event,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "band"]
    assert (event["step"], event["low"], event["high"]) == (0, 0.27, 0.33)
    assert "the band is 0.27 to 0.33 nats from here on: pass@16 is kept down to H=0.3" in console.getvalue()
