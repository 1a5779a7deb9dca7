import runpy
from pathlib import Path

import pytest

from pipeline.config.keys import leaf_keys
from pipeline.config.load import load_config
from pipeline.config.schema import ACTUATORS, ADVANTAGES, CONTROLLERS, LOSSES, SHAPINGS
from pipeline.methods import EVIDENCE, METHODS

ROOT = Path(__file__).resolve().parents[3]
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
        ("objective.loss", LOSSES[1:]),
        ("objective.token_shaping", SHAPINGS),
        ("entropy.actuator", ACTUATORS),
        ("entropy.controller", CONTROLLERS),
    ],
)
def test_whatever_can_be_chosen_has_a_method(key, choices):
    """The default advantage and loss are those of grpo."""
    words = {word for name in OFFERED for word in METHODS[name].overrides}
    bare = set(choices) - {"grpo"} if key == "objective.advantage" else set(choices)
    assert {f"{key}={choice}" for choice in bare} <= {word.replace("[", "").replace("]", "") for word in words}
