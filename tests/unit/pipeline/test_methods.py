import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.keys import leaf_keys
from pipeline.config.load import load_config
from pipeline.config.schema import ACTUATORS, ADVANTAGES, CONTROLLERS, LOSSES, SHAPINGS
from pipeline.entropy.actuator import actuator_called
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
import contextlib, io, json, sys
import pipeline.objectives.losses
pipeline.objectives.losses.__path__.append(sys.argv[1])
from launchers.cli.main import run

def called(*words):
    code, said = 0, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run([*words])
        except SystemExit as ended:
            code = ended.code
    return code, said.getvalue()

told = [called("lab", "methods", "--json")]
table = {row["name"]: row for row in json.loads(told[0][1])}
told.append(called("config", "validate", "--config", "quickstart.yaml", "objective.loss=toi"))
told.append(called("train", "--config", "quickstart.yaml", *table["toy"]["overrides"], *sys.argv[2:]))
print(json.dumps(told))
"""


def test_a_new_loss_is_one_file(tmp_path):
    """It stands in the table, in the choices of its key, and it trains."""
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses/toy.py").write_text(TOY)
    run = tmp_path / "run"
    small = ["rollout.prompts_per_step=4", "evaluation.every=0", "evaluation.at_start=false", "evaluation.at_end=false"]
    switch = ["steps=1", "runtime=inline", "learner.tensor_model_parallel_size=1", f"run_dir={run}", *small]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "losses"), *switch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (_, methods), wrong, trained = json.loads(done.stdout.splitlines()[-1])
    assert {row["name"]: row for row in json.loads(methods)}["toy"]["rule"] == "-3 A r"
    assert wrong[0] == 2
    assert "toy" in wrong[1]
    assert trained[0] == 0, trained[1]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events].count("step") == 1


TOY_CONTROLLER = """
from pipeline.entropy.law import Hold
from pipeline.methods import controller_method

MADE_FOR = ("toy_actuator",)
METHOD = controller_method("toy_controller", "a test", "u = 0.5", "ours", "entropy.actuator=toy_actuator")

def build(config, actuator):
    return Hold(actuator.upper / 2, "holding", "toy")
"""
TOY_ACTUATOR = """
from pipeline.entropy.actuator import Actuator
from pipeline.methods import pi_method

ACTUATOR = Actuator("toy_actuator", 0.0, 1.0, 0.0, 1.0)
METHOD = pi_method("toy_actuator", "nothing")
"""
SIMULATION = """
import json, sys
import pipeline.entropy.actuators, pipeline.entropy.controllers
pipeline.entropy.actuators.__path__.append(sys.argv[1] + "/actuators")
pipeline.entropy.controllers.__path__.append(sys.argv[1] + "/controllers")
from pipeline.config.schema import ACTUATORS, CONTROLLERS, EntropyConfig, RunConfig
from pipeline.config.entropy_rules import entropy_problems
from pipeline.entropy.plant import SCENARIOS, simulate
from pipeline.methods import all_methods

def commands(controller):
    trace = simulate(EntropyConfig(controller=controller, actuator="toy_actuator"), SCENARIOS["nominal"], 0)
    return [float(command) for command in trace.commands]

strange = RunConfig(entropy=EntropyConfig(controller="toy_controller", actuator="tok"))
print(json.dumps({
    "choices": [*ACTUATORS, *CONTROLLERS],
    "rules": {name: method.rule for name, method in all_methods().items()},
    "toy": commands("toy_controller"),
    "pi": commands("pi"),
    "problems": [problem.remedy for problem in entropy_problems(strange)],
}))
"""


def test_a_new_actuator_or_controller_is_one_file(tmp_path):
    """It stands in the table and in the choices of its key, it is simulated, and goes only with what it is made for."""
    for kind, text in (("actuator", TOY_ACTUATOR), ("controller", TOY_CONTROLLER)):
        (tmp_path / f"{kind}s").mkdir()
        (tmp_path / f"{kind}s/toy_{kind}.py").write_text(text)
    command = [sys.executable, "-c", SIMULATION, str(tmp_path)]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert {"toy_actuator", "toy_controller"} <= set(found["choices"])
    assert found["rules"]["toy_controller"] == "u = 0.5"
    assert found["rules"]["isentrope_toy_actuator"] == "PI on ln H, nothing"
    assert set(found["toy"]) == {0.5}
    assert len(set(found["pi"])) > 10
    assert found["problems"] == ["use controller=pi, or entropy.actuator=toy_actuator"]


@pytest.mark.parametrize("name", ACTUATORS)
def test_an_actuator_is_called_as_its_file_is(name):
    """What the learner is told to do goes by the actuator's own name."""
    assert actuator_called(name).name == name


def test_actuators_and_controllers_need_no_torch():
    """A check of a configuration asks their files what goes together."""
    program = """
import sys
from pipeline.config.schema import ACTUATORS, CONTROLLERS
from pipeline.registry import load
for name in ACTUATORS: load("pipeline.entropy.actuators", name)
for name in CONTROLLERS: load("pipeline.entropy.controllers", name)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_check_of_the_configuration_needs_no_torch():
    program = "import sys, pipeline.config.validate, pipeline.config.schema; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
