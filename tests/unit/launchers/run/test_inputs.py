"""What `config validate` and `train` open before anything starts."""

import importlib.util
import json
import shutil

import pytest

from launchers.run.inputs import check_inputs, check_start
from pipeline.config.errors import ConfigError
from pipeline.config.load import PACKAGED, load_config
from pipeline.data import DataError
from tests.command_line import call


@pytest.fixture
def model(tmp_path):
    shutil.copytree(PACKAGED / "model" / "pm4-100k", tmp_path / "model")
    return tmp_path / "model"


def config(model, *overrides):
    return load_config("quickstart.yaml", [f"model.hf_path={model}", *overrides])


def test_a_good_configuration_opens(model, tmp_path):
    check_inputs(config(model, f"run_dir={tmp_path}/runs/new"))


def truncated(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-100])


def absent(model):
    (model / "model.safetensors").unlink()


def test_keys_without_effect_are_told(model, caplog):
    check_start(config(model, "entropy.controller=none", "entropy.actuator=clip_high"))
    assert "entropy.actuator=clip_high has no effect with entropy.controller=none: remove, or set" in caplog.text


def test_what_lies_behind_the_last_step_is_told(model, caplog):
    check_start(config(model, "entropy.band={schedule: piecewise, points: [[5, 0.1, 0.2], [5000, 0.2, 0.3]]}"))
    assert "entropy.band.points=[5000, 0.2, 0.3] has no effect before the run is lengthened" in caplog.text


def test_widths_that_a_gpu_would_refuse_are_told_in_emulation(model, caplog):
    """The house model's feed-forward block is 84 wide, on each side of its gate."""
    emulated = ["learner.precision.fp8=hybrid", "learner.precision.emulate=true"]
    check_start(config(model, *emulated))
    assert "takes what no GPU run with emulate=false will: FP8 products take widths of multiples of 16" in caplog.text
    assert "mlp.linear_fc2.weight [64, 84]" in caplog.text
    caplog.clear()
    check_start(config(model))
    assert caplog.text == ""


@pytest.mark.parametrize("damage", [truncated, absent])
def test_a_damaged_model_is_refused(model, damage, capsys):
    damage(model)
    with pytest.raises(ConfigError) as error:
        check_start(config(model))
    assert error.value.problems[0].key == "model.hf_path"
    assert "model.safetensors" in error.value.problems[0].problem
    code, _, err = call(capsys, "config", "validate", "--config", "quickstart.yaml", f"model.hf_path={model}")
    assert (code, "model.safetensors" in err) == (2, True)


def test_a_missing_tokenizer_and_bad_data_are_data_errors(model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    jsonl = ["data.source.kind=jsonl", f"data.source.path={tmp_path}/a.jsonl"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'answer' is missing"):
        check_inputs(config(model, *jsonl))
    (model / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        check_inputs(config(model))


def test_a_missing_package_is_named_with_the_command_that_installs_it(model, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sglang" else real(name, *a))
    with pytest.raises(
        ConfigError, match=r"the package sglang is not installed(.|\n)*pip install 'isentrope\[sglang\]'"
    ):
        check_start(config(model, "rollout.engine=sglang"))


def test_a_run_dir_that_cannot_be_written_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"run_dir: (.|\n)*{tmp_path}/file is a file"):
        check_start(config(model, f"run_dir={tmp_path}/file/run"))


def test_a_tokenizer_of_another_model_is_refused(model):
    settings = json.loads((model / "config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": settings["vocab_size"]}))
    with pytest.raises(DataError, match="beyond the model's vocabulary"):
        check_inputs(config(model))
