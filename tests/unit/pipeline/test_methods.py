import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.keys import leaf_keys
from pipeline.config.load import load_config
from pipeline.config.schema import ACTUATORS, ADVANTAGES, CONTROLLERS, LOSSES, SHAPINGS
from pipeline.methods import EVIDENCE, all_methods

ROOT = Path(__file__).resolve().parents[3]
METHODS = all_methods()
OFFERED = [name for name, method in METHODS.items() if not method.missing]


def test_the_page_is_up_to_date():
    tool = runpy.run_path(str(ROOT / "tools" / "make_methods_docs.py"))
    assert tool["PAGE"].read_text() == tool["page"](), "run: python tools/make_methods_docs.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_switched_on_or_says_why_not(name):
    method = METHODS[name]
    assert bool(method.overrides) != bool(method.missing)
    assert method.evidence in EVIDENCE
    if not method.missing:
        config = load_config(ROOT / "configs/recipe/pm4.yaml", list(method.overrides))
        for word in method.overrides:
            assert word.partition("=")[0] in leaf_keys()
        assert (config.entropy.controller == "none") == ("entropy.controller=none" in method.overrides)


def test_no_two_methods_are_the_same():
    assert len({METHODS[name].overrides for name in OFFERED}) == len(OFFERED)


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("objective.advantage", ADVANTAGES),
        ("objective.loss", LOSSES),
        ("objective.token_shaping", SHAPINGS),
        ("entropy.actuator", ACTUATORS),
        ("entropy.controller", CONTROLLERS),
    ],
)
def test_whatever_can_be_chosen_has_a_method(key, choices):
    """The default advantage and loss are those of grpo."""
    words = {word for name in OFFERED for word in METHODS[name].overrides}
    bare = set(choices) - {"grpo", "ppo"}
    assert {f"{key}={choice}" for choice in bare} <= {word.replace("[", "").replace("]", "") for word in words}


TOY = """
import torch
from pipeline.methods import loss_method

METHOD = loss_method("toy", "a test", "-3 A r")

def surrogate(inputs, objective):
    return -3 * inputs.advantages * inputs.ratio, torch.zeros_like(inputs.ratio, dtype=torch.bool)
"""
PROGRAM = """
import sys
import pipeline.objectives.losses
pipeline.objectives.losses.__path__.append(sys.argv[1])
from launchers.cli.main import run
sys.argv[:] = ["isentrope", *sys.argv[2:]]
run()
"""


def with_toy(folder, *words):
    """The command line, in a house with one more file in ``losses``."""
    command = [sys.executable, "-c", PROGRAM, str(folder), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_a_new_loss_is_one_file(tmp_path):
    """It stands in the table, in the choices of its key, and it trains."""
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses/toy.py").write_text(TOY)
    folder = tmp_path / "losses"
    table = {row["name"]: row for row in json.loads(with_toy(folder, "lab", "methods", "--json").stdout)}
    assert table["toy"]["rule"] == "-3 A r"
    wrong = with_toy(folder, "config", "validate", "--config", "quickstart.yaml", "objective.loss=toi")
    assert wrong.returncode == 2
    assert "toy" in wrong.stderr + wrong.stdout
    run = tmp_path / "run"
    switch = [
        *table["toy"]["overrides"],
        "steps=1",
        "evaluation.every=0",
        "runtime=inline",
        "learner.tensor_model_parallel_size=1",
    ]
    trained = with_toy(folder, "train", "--config", "quickstart.yaml", *switch, f"run_dir={run}")
    assert trained.returncode == 0, trained.stderr
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events].count("step") == 1


def test_a_check_of_the_configuration_needs_no_torch():
    program = "import sys, pipeline.config.validate, pipeline.config.schema; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
