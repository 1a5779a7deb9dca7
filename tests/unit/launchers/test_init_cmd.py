"""``isentrope init``: what it writes validates, and its layouts fit."""

import json
from dataclasses import replace

import pytest
import yaml

from launchers.plan import propose
from pipeline.config.errors import ConfigError
from pipeline.config.load import PACKAGED, load_config
from pipeline.config.schema import DataConfig
from pipeline.data import jsonl, sources
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.start import Start, measure
from pipeline.model import architecture
from pipeline.rewards.stage import VerifierStage
from pipeline.types import Prompt
from tests.command_line import call

PM4 = PACKAGED / "model/pm4-100k"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "my.jsonl"
    lines = [{"id": f"{i}", "prompt": f"{i:04},10=", "answer": f"{i % 9}"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_it_writes_a_configuration_that_validates_as_it_is(capsys, tmp_path, data):
    out = tmp_path / "my.yaml"
    code, said, _ = call(capsys, "init", str(PM4), str(data), "--out", str(out), "--verifier", "exact")
    assert code == 0
    assert f"isentrope train --config {out}" in said
    config = load_config(out)
    assert (config.rollout.max_prompt_tokens, config.data.verifier, config.runtime) == (8, "exact", "inline")
    start = float(out.read_text().partition("starts at ")[2].split()[0])
    assert 0.1 < start < 2
    assert config.entropy.band.low < start / 2 < config.entropy.band.high
    assert config.entropy.positive_mean == "samples"  # a random model
    assert "of 64 measured responses are right, so about" in out.read_text()
    code, _, said = call(capsys, "init", str(PM4), str(data), "--out", str(out))
    assert code == 2
    assert "this file exists" in said


def test_the_data_are_read_once(capsys, monkeypatch, tmp_path, data):
    """Their verifiers grade every reference, which takes long where there are many."""
    looks = []

    def look(path, config, real=jsonl.examine_jsonl):
        looks.append(path)
        return real(path, config)

    for module in (jsonl, sources):
        monkeypatch.setattr(module, "examine_jsonl", look)
    words = ["--no-measure", "--verifier", "exact", "--out", str(tmp_path / "my.yaml")]
    assert call(capsys, "init", str(PM4), str(data), *words)[0] == 0
    assert looks == [data]


def test_a_verifier_of_ones_own_is_looked_for_beside_what_is_written(capsys, tmp_path, data):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/init_reward.py").write_text("def score(prompt, text):\n    return 1.0\n")
    out = tmp_path / "own/my.yaml"
    words = ["--verifier", "init_reward:score", "--no-measure", "--out", str(out)]
    assert call(capsys, "init", str(PM4), str(data), *words)[0] == 0
    assert load_config(out).data.verifier_folder == str(tmp_path / "own")


def test_without_a_measurement_it_says_so(capsys, tmp_path, data):
    out = tmp_path / "my.yaml"
    assert call(capsys, "init", str(PM4), str(data), "--out", str(out), "--no-measure")[0] == 0
    assert "Not measured" in out.read_text()
    assert yaml.safe_load(out.read_text())["entropy"]["band"] == {"low": 0.27, "high": 0.33}


def test_bad_data_is_reported_as_training_would(capsys, tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text('{"id": 1, "question": "1+1="}\n')
    code, _, said = call(capsys, "init", str(PM4), str(path), "--out", str(tmp_path / "my.yaml"))
    assert code == 2
    assert "my.jsonl:1: unknown key 'question', nearest is 'prompt'" in said
    assert not (tmp_path / "my.yaml").exists()


def facts(data, name, gpus):
    folder = PACKAGED / "model" / name
    return propose.Facts(
        model=architecture.read(folder),
        folder=folder,
        data=data,
        prompts=1000,
        longest=300,
        verifier="math",
        chat=True,
        gpus=gpus,
        gpu_gib=80.0,
        start=None,
    )


@pytest.mark.parametrize(("name", "gpus"), [("qwen3-4b", 4), ("qwen3-4b", 8), ("qwen3-32b", 32)])
def test_a_layout_uses_the_gpus_named(data, name, gpus, tmp_path):
    asked = facts(data, name, gpus)
    keys = propose.keys(asked)
    path = tmp_path / "my.yaml"
    path.write_text(propose.text(asked, keys))
    config = load_config(path)
    engines = config.rollout.engines * config.rollout.tensor_parallel_size
    assert config.learner.world_size + engines == gpus


@pytest.mark.parametrize(
    ("graded", "right", "proposed"),
    [(64, 0, "samples"), (64, 1, None), (256, 1, "samples"), (64, 40, None), (0, 0, None)],
)
def test_few_right_answers_are_averaged_over_all(data, graded, right, proposed):
    """A step draws 16 x 64 answers here: 6 of them are 0.6 %."""
    asked = replace(facts(data, "qwen3-4b", 8), start=Start(0.5, 1000, 100.0, 0.0, graded, right))
    chosen = propose.keys(asked)
    assert chosen.get("entropy.positive_mean") == proposed
    assert (f"{right} of {graded} measured responses" in propose.text(asked, chosen)) == bool(proposed)


def test_too_few_gpus_are_refused(data):
    with pytest.raises(ConfigError, match=r"2 GPUs of 80 GiB are too few for 32\.8B parameters"):
        propose.keys(facts(data, "qwen3-32b", 2))


def test_the_entropy_that_is_measured_is_the_policys():
    """A response's entropy by hand: every token's distribution from the prompt and the tokens before it."""
    import torch

    from pipeline.model import layout
    from pipeline.model.folder import Folder
    from pipeline.rollout.native.decoder import Decoder

    prompt = Prompt("p", (1, 2, 3, 4, 14, 1, 0, 13), "", None, "exact")
    found = measure(PM4, [prompt], VerifierStage(DataConfig(), load_tokenizer(PM4)), samples=1, max_new_tokens=1)
    model = architecture.read(PM4)
    stored = Folder(PM4, model)
    decoder = Decoder(model, {name: stored.tensor(name) for name in layout.tensor_shapes(model)})
    hidden, _ = decoder.prefill(torch.tensor([prompt.token_ids]))
    first = torch.distributions.Categorical(logits=decoder.logits(hidden[:, -1])).entropy()
    assert found.tokens == 1
    assert found.entropy == pytest.approx(float(first), rel=1e-5)
