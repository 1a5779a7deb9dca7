"""``isentrope plan learner`` as a user meets it, and the recipes it must find room for."""

import json
import re

import pytest

from pipeline.config.load import load_config
from tests import command_line

GIB = 2**30
RECIPES = {"qwen3-32b": 32, "qwen3-32b-32k": 32, "qwen2.5-32b": 32, "qwen3-30b-a3b": 16, "qwen3-235b-a22b": 128}


def call(capsys, *words):
    return command_line.call(capsys, "plan", "learner", *words)


def plan(capsys, *words):
    return command_line.answer(capsys, "plan", "learner", *words)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid_and_fit(capsys, recipe):
    load_config(f"recipe/{recipe}.yaml")
    result = plan(capsys, "--config", f"recipe/{recipe}.yaml", "--mean-response", "8192")
    assert result["fits"]
    assert result["gpus"] == RECIPES[recipe]
    assert result["peak_bytes"] == max(stage["total_bytes"] for stage in result["stages"])
    assert 0.5 < result["peak_bytes"] / (80 * GIB) < 0.85  # room for what is not computed, and no GPU idle
    for stage in result["stages"]:
        assert stage["total_bytes"] >= sum(stage["bytes"].values())
    assert result["layers"] == "transformer_engine"
    assert result["step"]["bubble"] < 0.02
    assert 0.25 < result["step"]["mfu"] <= 0.45


def test_what_does_not_fit_exits_with_1_and_says_what_would(capsys):
    words = ("--config", "recipe/qwen3-32b.yaml", "learner.optimizer.distributed=false")
    words += ("learner.optimizer.overlap_param_gather=false", "--gpu-gib", "60")
    code, out, err = call(capsys, *words, "--json")
    result = json.loads(out)
    assert (code, err, result["fits"]) == (1, "", False)
    saved = {remedy["key"]: remedy["saves_bytes"] for remedy in result["remedies"]}
    # Half of Adam's 12 bytes on the fullest stage: 24 GiB alone, 12 with DP 2.
    assert saved["learner.optimizer.distributed"] == pytest.approx(
        result["stages"][0]["bytes"]["optimizer"] / 2, rel=0.01
    )
    order = [remedy["saves_bytes"] for remedy in result["remedies"]]
    assert order == sorted(order, reverse=True)
    assert {remedy["gpus"] for remedy in result["remedies"]} == {32, 64}
    code, out, _ = call(capsys, *words)
    assert code == 1
    assert "DOES NOT FIT" in out
    assert "learner.optimizer.distributed=true: -12" in out


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("recipe/qwen3-32b.yaml", r" s for 2048 rows, \d{2,3},\d00 tokens/s, MFU 0\."),
        ("quickstart.yaml", " under 1 s of arithmetic"),
    ],
)
def test_the_speed_is_rounded_and_none_is_told_of_a_tiny_model(capsys, config, said):
    _, out, _ = call(capsys, "--config", config)
    assert re.search(f"train phase:.*{said}", out)
    assert ("tokens/s" in out) == ("recipe" in config)


def test_table_figure_and_a_model_known_by_name(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    words = ("--config", "recipe/qwen3-32b.yaml", "model.hf_path=models/Qwen3-32B", "--figure", str(picture))
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    for word in ("stage 3", "activations", "FIT:", "micro-batches per replica", "not measured"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_assumed_speed_scales_the_seconds(capsys):
    words = ("--config", "recipe/qwen3-32b.yaml")
    base = plan(capsys, *words)["step"]
    half = plan(capsys, *words, "--tflops", "494.5")["step"]
    assert half["seconds"] == pytest.approx(2 * base["seconds"])
    assert half["mfu"] == pytest.approx(base["mfu"])
    longest = plan(capsys, *words, "--mean-response", "8192")
    assert base["seconds"] < 0.4 * longest["step"]["seconds"]  # 2,458 of 8,192 tokens, and the prompts
    assert plan(capsys, *words)["peak_bytes"] == longest["peak_bytes"], "memory is for the longest rows"


def test_the_quickstart_s_model_fits_anywhere(capsys):
    result = plan(capsys, "--config", "quickstart.yaml")
    assert result["gpus"] == 2
    assert result["peak_bytes"] < 3.1 * GIB  # the stated constant


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (("model.hf_path=models/Qwen9-1T",), "model.hf_path", "qwen3-32b"),
        (("learner.tensor_model_parallel_size=3",), "learner.tensor_model_parallel_size", "use one of"),
        (("learner.recompute_granularity=all",), "learner.recompute_granularity", "did you mean"),
        (("learner.expert_model_parallel_size=2",), "expert", " 1"),
        (("--mean-response", "99999"), "--mean-response", "lower one"),
        (("--utilization", "1.5"), "--utilization", "less than or equal to 1"),
    ],
)
def test_mistakes_name_the_key_and_a_remedy(capsys, words, key, remedy):
    code, out, err = call(capsys, "--config", "recipe/qwen3-32b.yaml", *words)
    assert (code, out) == (2, "")
    text = " ".join(err.replace("│", " ").split())
    assert key in text
    assert remedy in text
    assert "Traceback" not in err


def test_help_has_an_example(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "Examples" in out
