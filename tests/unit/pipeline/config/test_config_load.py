"""Composition, overrides, types, and what comes back out."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.keys import leaf_keys
from pipeline.config.load import PACKAGED, config_hash, document, load_config, override, resolve_path, to_yaml

WRONG = {
    "an integer": ["x", 1.5, True, [1], {"a": 1}, None],
    "a number": ["x", True, [1], {"a": 1}, None],
    "true or false": ["x", 2, 1.5, [1], {"a": 1}, None],
    "text": [True, [1], {"a": 1}, None],
    "a list of integers": ["x", 1, ["x"], [1.5], {"a": 1}, None],
    "a list of numbers": ["x", 1, ["x"], [[1]], {"a": 1}, None],
    "a list of texts": ["x", 1, [[1]], {"a": 1}, None],
    "a list of lists of numbers": ["x", 1, ["x"], [1], [["x"]], {"a": 1}, None],
    "a list of lists of texts": ["x", 1, ["x"], [[[1]]], {"a": 1}, None],
    "a mapping": ["x", 1, [1], None],
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load(path=None, *overrides):
    return load_config(path, ["model.hf_path=x", *overrides], check=False)


def problem_of(path=None, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    return caught.value.problems[0]


@pytest.mark.parametrize("key", leaf_keys())
def test_a_wrong_type_names_key_value_and_the_right_type(key):
    type_name = leaf_keys()[key].type_name
    values = WRONG[type_name]
    with pytest.raises(ConfigError) as caught:
        load(None, *(f"{key}={json.dumps(value)}" for value in values))
    found = [(p.key, p.value, p.problem, p.source) for p in caught.value.problems]
    assert found == [(key, value, "wrong type", "command line") for value in values]
    assert all(type_name in p.remedy for p in caught.value.problems)


def test_whole_floats_are_integers():
    config = load(None, "steps=1e3", "seed=2.0", "evaluation.k=[1.0, 4]", "rollout={engines: 2.0}")
    assert repr((config.steps, config.seed, config.evaluation.k, config.rollout.engines)) == "(1000, 2, [1, 4], 2)"


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.yaml", "steps: 1\nseed: 1\nlearner: {micro_batch_size: 1, optimizer: {lr: 1e-4}}\n")
    write(tmp_path / "deep" / "b.yaml", "defaults: [../a.yaml]\nsteps: 2\nlearner: {optimizer: {min_lr: 1e-5}}\n")
    top = write(tmp_path / "c.yaml", "defaults: [a.yaml, deep/b.yaml]\nname: c\nlearner:\n  bucket_mib: 7\n")
    config = load(top, "seed=3", "evaluation.k=[1, 2]", "learner.optimizer.eps=1e-6", "run_dir=''")
    assert (config.steps, config.seed, config.name) == (2, 3, "c")
    assert (config.learner.micro_batch_size, config.learner.bucket_mib) == (1, 7)
    assert (config.learner.optimizer.lr, config.learner.optimizer.min_lr) == (1e-4, 1e-5)
    assert (config.evaluation.k, config.learner.optimizer.eps) == ([1, 2], 1e-6)
    assert config.learner.optimizer.betas == [0.9, 0.95]


def test_defaults_fall_back_to_the_packaged_folder(tmp_path):
    top = write(tmp_path / "mine.yaml", "defaults: [recipe/pm4.yaml]\nname: mine\n")
    assert load_config(top, check=False).data.source.task == "pm4"


def test_free_form_parameters_merge(tmp_path):
    base = write(
        tmp_path / "base.yaml", "data: {source: {kind: reasoning_gym, params: {min_terms: 2, max_terms: 3}}}\n"
    )
    config = load(base, "data.source.params.max_terms=4", "data.source.params.extra={a: [1]}")
    assert config.data.source.params == {"min_terms": 2, "max_terms": 4, "extra": {"a": [1]}}


def test_an_unknown_key_in_a_section_on_the_command_line_is_named_whole():
    assert problem_of(None, "entropy.band={lo: 0.3}").key == "entropy.band.lo"


def test_an_unknown_key_in_an_included_file_names_that_file(tmp_path):
    base = write(tmp_path / "base.yaml", "rollout: {engnie: native}\n")
    top = write(tmp_path / "top.yaml", "defaults: [base.yaml]\nstep: 3\n")
    with pytest.raises(ConfigError) as caught:
        load(top, "lr=1")
    assert [(p.key, p.source) for p in caught.value.problems] == [
        ("rollout.engnie", str(base)),
        ("step", str(top)),
        ("lr", "command line"),
    ]
    text = str(caught.value)
    assert text.startswith("3 configuration errors\n  rollout.engnie: 'native'   (")
    assert "did you mean rollout.engine?" in text
    assert "did you mean steps?" in text


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("steps: [1\n", "not readable as YAML"),
        ("steps: 1\nsteps: 2\n", "duplicate key"),
        ("- 1\n", "not a mapping"),
        ("defaults: other.yaml\n", "not a list"),
        ("defaults: [absent.yaml]\n", "no such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, word):
    assert word in problem_of(write(tmp_path / "bad.yaml", text)).problem


def test_a_missing_file_and_a_circle(tmp_path):
    assert problem_of(tmp_path / "no.yaml").problem == "no such file"
    write(tmp_path / "a.yaml", "defaults: [b.yaml]\n")
    write(tmp_path / "b.yaml", "defaults: [a.yaml]\n")
    assert "circle" in problem_of(tmp_path / "a.yaml").problem


def test_missing_mandatory_key():
    with pytest.raises(ConfigError, match=r"model\.hf_path: None\n.*a value is required"):
        load_config(None, check=False)


@pytest.mark.parametrize("override", ["steps", "=3", "steps=[1"])
def test_malformed_overrides(override):
    with pytest.raises(ConfigError, match="command line"):
        load(None, override)


def test_a_file_among_the_overrides_is_sent_to_its_option():
    assert "--config my.yaml" in problem_of(None, "my.yaml").remedy


def test_references_resolve_and_broken_ones_are_reported():
    assert load(None, "seed=7", "steps=${seed}").steps == 7
    assert "nowhere" in problem_of(None, "steps=${nowhere}").problem


def test_yaml_and_document_load_back_to_the_same_configuration(tmp_path):
    config = load(
        None,
        "name='5'",
        "entropy.band.points=[[0, .2, .3]]",
        "data.source.params={a: {b: 1}}",
        "data.system_prompt='# {x}: y'",
    )
    assert load_config(write(tmp_path / "a.yaml", to_yaml(config)), check=False) == config
    assert load_config(write(tmp_path / "b.yaml", document(config)), check=False) == config
    for leaf in leaf_keys().values():
        assert f"# {leaf.help}" in document(config)


def test_hash_ignores_labels_and_sees_everything_else():
    config = load()
    assert config_hash(replace(config, name="other", run_dir="elsewhere")) == config_hash(config)
    for change in ("seed=1", "learner.optimizer.lr=2e-6", "evaluation.k=[1]"):
        assert config_hash(load(None, change)) != config_hash(config)
    assert len(config_hash(config)) == 64


def test_paths_resolve_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = PACKAGED / "quickstart.yaml"
    assert resolve_path("quickstart.yaml") == packaged
    assert resolve_path("configs/quickstart.yaml") == packaged
    write(tmp_path / "quickstart.yaml", "")
    assert resolve_path("quickstart.yaml") == Path("quickstart.yaml")
    assert resolve_path("nowhere/x") == Path("nowhere/x")


def test_configuration_needs_no_torch():
    code = "import sys, pipeline.config.load; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGED.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def own_file(tmp_path, text):
    """A configuration in a folder of its own, with a model and data beside it."""
    folder = tmp_path / "mine"
    (folder / "model").mkdir(parents=True)
    (folder / "data.jsonl").write_text("")
    return write(folder / "run.yaml", text)


PATHS = "model: {hf_path: model}\ndata: {source: {kind: jsonl, path: data.jsonl}}\n"


def test_a_path_belongs_to_the_file_that_names_it(tmp_path, monkeypatch):
    top = own_file(tmp_path, PATHS)
    including = write(tmp_path / "top.yaml", "defaults: [mine/run.yaml]\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for file in (top, including):
        config = load_config(file, check=False)
        assert config.model.hf_path == str(tmp_path / "mine" / "model")
        assert config.data.source.path == str(tmp_path / "mine" / "data.jsonl")
    write(elsewhere / "data.jsonl", "")
    config = load_config(top, ["data.source.path=data.jsonl"], check=False)
    assert config.data.source.path == str(elsewhere / "data.jsonl")
    again = write(tmp_path / "mine" / "config.yaml", to_yaml(config))
    assert load_config(again, check=False) == config


def test_a_packaged_path_stays_one_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(tmp_path / "a.yaml", "model: {hf_path: model/pm4-100k}\n")
    assert load_config(path, check=False).model.hf_path == "model/pm4-100k"
    assert load(None, "model.hf_path=~/m").model.hf_path == str(tmp_path / "home" / "m")
    assert load(None, "model.hf_path=~nobody-of-that-name/m").model.hf_path == str(
        tmp_path / "~nobody-of-that-name" / "m"
    )
    write(tmp_path / "b.yaml", "defaults: ['~/base.yaml']\n")
    assert str(tmp_path / "b.yaml") in str(problem_of(tmp_path / "b.yaml"))


def test_a_path_that_is_not_there_is_told_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["data.source.kind=jsonl", "data.source.path=no.jsonl"]
    with pytest.raises(ConfigError) as caught:
        load_config(Path("quickstart.yaml"), overrides)
    assert [(p.key, p.value) for p in caught.value.problems] == [("data.source.path", str(tmp_path / "no.jsonl"))]


def test_what_is_written_belongs_to_the_folder_of_the_file_that_names_it(tmp_path, monkeypatch):
    """And never to a packaged folder of the same name."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    mine = tmp_path / "a" / "mine.yaml"
    mine.write_text("defaults: [quickstart.yaml]\nrun_dir: recipe\nmonitoring: {prometheus: {targets: ~/targets}}\n")
    config = load_config(mine)
    assert config.run_dir == str(tmp_path / "a" / "recipe")
    assert config.monitoring.prometheus.targets == "/home/me/targets"
    assert load_config(mine, ["run_dir=runs/x"]).run_dir == str(tmp_path / "runs" / "x")
    assert load_config(mine, ["run_dir=~/x"]).run_dir == "/home/me/x"
    assert load_config(mine, ["run_dir=''"]).run_dir == ""


def test_own_verifiers_belong_to_the_folder_of_the_file_that_names_them(tmp_path):
    """And stay there, in the run's own config.yaml, however the run is resumed."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    base, top = tmp_path / "a" / "base.yaml", tmp_path / "b" / "top.yaml"
    base.write_text("defaults: [quickstart.yaml]\ndata: {verifier: 'mine:score'}\n")
    top.write_text(f"defaults: [{base}]\n")

    def folder(path, *overrides):
        return load_config(path, overrides).data.verifier_folder

    assert folder(base) == folder(top) == str(base.parent)
    assert folder(top, "data.verifier=other:score") == str(top.parent)
    assert folder(top, "data.verifier=exact") == ""
    assert folder(top, f"data.verifier_folder={tmp_path}") == str(tmp_path)
    top.write_text(f"defaults: [{base}]\ndata: {{verifier_folder: ../a}}\n")
    assert Path(folder(top)).resolve() == base.parent
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(load_config(base)))
    assert folder(saved) == str(base.parent)
    for environment in ("{name: function, id: 'mine:run', max_turns: 2}", "{name: verifiers, id: mine, max_turns: 2}"):
        base.write_text(f"defaults: [quickstart.yaml]\ndata: {{environment: {environment}}}\n")
        top.write_text(f"defaults: [{base}]\n")
        assert folder(top) == str(base.parent)


@pytest.mark.parametrize(
    "text", ["a b", "a: b", "#a", "[a]", "${a}", r"\${a}", "'", '"', "\x7fa", "ä\U0001f600", "~", "", "010", "a\nb"]
)
def test_an_override_means_its_text_and_so_does_what_is_written(text, tmp_path):
    config = load_config("quickstart.yaml", [override("data.system_prompt", text)], check=False)
    assert config.data.system_prompt == text
    for write in (to_yaml, document):
        (tmp_path / "config.yaml").write_text(write(config))
        assert load_config(tmp_path / "config.yaml", check=False) == config
