"""What `train --resume` says and refuses before anything starts."""

import json

import pytest

from launchers.run.resume import resumption, run_to_resume
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config, to_yaml
from tests.command_line import call


@pytest.fixture
def run(tmp_path):
    """A run of which three steps of four are done and saved."""
    folder = tmp_path / "runs" / "mine-20260101"
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config("quickstart.yaml", ["steps=4", "name=mine"])))
    kinds = [{"kind": "run_start", "step": 0, "attempt": 1}, *({"kind": "step", "step": step} for step in range(3))]
    lines = [json.dumps({"schema": 1, "time": 1.0, **entry}) + "\n" for entry in kinds]
    (folder / "events.jsonl").write_text("".join(lines))
    return folder


def given(run, *overrides, allow_change=False):
    return resumption(run, load_config(run / "config.yaml", overrides), allow_change=allow_change)


def test_it_says_where_it_goes_on_and_what_has_changed(run):
    assert str(given(run)) == "from step 3 of 4; changed: nothing"
    found = given(run, "steps=9", "learner.optimizer.lr=0.001")
    assert str(found) == "from step 3 of 9; changed: steps 4 -> 9, learner.optimizer.lr 0.0003 -> 0.001"
    assert not found.complete


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("steps=2", "steps", "give more than 3"),
        ("learner.tensor_model_parallel_size=1", "learner.tensor_model_parallel_size", "keep learner.tensor"),
        ("model.dtype=bf16", "model.dtype", "keep model.dtype=fp32"),
        ("learner.optimizer.distributed=true", "learner.optimizer.distributed", "convert megatron-to-hf"),
        ("learner.lora.rank=4", "learner.lora.rank", "keep learner.lora.rank=0"),
        ("seed=1", "seed", "--allow-change"),
        ("data.held_out=0.2", "data.held_out", "--allow-change"),
        ("data.source.task=pm3", "data.source.task", "--allow-change"),
        ("model.hf_path=model/cd3-100k", "model.hf_path", "--allow-change"),
        ("entropy.band.low=0.2", "entropy.band.low", "--allow-change"),
        ("entropy.repeated_prompts=8", "entropy.repeated_prompts", "--allow-change"),
        ("entropy.controller=none", "entropy.controller", "new run"),
        ("entropy.actuator=tok", "entropy.actuator", "new run"),
    ],
)
def test_what_cannot_go_on_is_refused(run, override, key, remedy):
    with pytest.raises(ConfigError) as error:
        given(run, override)
    assert [problem.key for problem in error.value.problems] == [key]
    assert remedy in error.value.problems[0].remedy


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_band_that_moves_until_the_last_step_is_not_stretched_unasked(run, schedule):
    moving = [
        f"entropy.band.{each}" for each in (f"schedule={schedule}", "end_low=0.1", "end_high=0.2", "hold_steps=1")
    ]
    (run / "config.yaml").write_text(to_yaml(load_config(run / "config.yaml", moving)))
    with pytest.raises(ConfigError, match="with more steps it is another") as error:
        given(run, "steps=9")
    assert "set entropy.band.schedule_steps=3" in error.value.problems[0].remedy
    assert given(run, "steps=9", "entropy.band.schedule_steps=3").steps == 9
    assert given(run, "steps=9", allow_change=True).steps == 9


@pytest.mark.parametrize("override", ["evaluation.prompts=8", "evaluation.temperature=0.6"])
def test_a_band_is_not_found_from_two_kinds_of_evaluations_unasked(run, override):
    assert given(run, override).step == 3
    found = ["entropy.band.schedule=auto", "evaluation.every=1", "steps=100"]
    (run / "config.yaml").write_text(to_yaml(load_config(run / "config.yaml", found)))
    with pytest.raises(ConfigError, match="the band is found from how pass@k moves") as error:
        given(run, override)
    assert [problem.key for problem in error.value.problems] == [override.split("=")[0]]
    assert given(run, override, allow_change=True).step == 3


def test_control_may_be_switched_on_and_changed_when_asked_for(run):
    changed = ["entropy.band.low=0.2", "entropy.pi.kp=2", "entropy.pi.ki=0.07", "entropy.controller=bang_bang"]
    assert given(run, *changed, allow_change=True).changed.keys() == {each.split("=")[0] for each in changed}
    off = ["entropy.controller=none"]
    (run / "config.yaml").write_text(to_yaml(load_config(run / "config.yaml", off)))
    assert given(run, "entropy.band.low=0.2").step == 3
    with pytest.raises(ConfigError, match="say --allow-change: then a new controller begins"):
        given(run, "entropy.controller=pi", "entropy.actuator=tok")
    assert given(run, "entropy.controller=pi", "entropy.actuator=tok", allow_change=True).step == 3


def test_evaluate_refuses_what_cannot_read_the_checkpoints(run, capsys):
    code, _, said = call(capsys, "evaluate", "--run", str(run), "learner.lora.rank=4", "seed=1")
    assert code == 2
    assert "learner.lora.rank: 4" in said
    assert "keep learner.lora.rank=0" in said
    assert "seed" not in said


def test_another_experiment_is_allowed_when_asked_for(run):
    assert given(run, "seed=1", allow_change=True).changed == {"seed": (0, 1)}
    with pytest.raises(ConfigError, match="can only be restored so"):
        given(run, "model.dtype=bf16", allow_change=True)


def test_the_nearest_run_is_named(run, capsys):
    with pytest.raises(ConfigError, match=r"no such run \(/(.|\n)*did you mean .*mine-20260101\?"):
        run_to_resume(run.parent / "mine-2026010")
    with pytest.raises(ConfigError, match="this folder holds no run"):
        run_to_resume(run.parent)
    code, _, err = call(capsys, "train", "--resume", str(run.parent / "nope"))
    assert (code, "no such run" in err) == (2, True)


def test_a_complete_run_says_so_at_once(run, capsys):
    with (run / "events.jsonl").open("a") as log:
        log.write('{"schema":1,"kind":"run_end","time":2.0,"status":"completed","error":""}\n')
    (run / "config.yaml").write_text(to_yaml(load_config("quickstart.yaml", ["steps=3", "name=mine"])))
    assert given(run).complete
    assert not given(run, "steps=4").complete


def test_resumed_with_a_terminal_the_words_come_first(run, capsys):
    code, _, err = call(capsys, "train", "--resume", str(run), "steps=1")
    assert (code, "the run has done 3 steps already" in err) == (2, True)
