"""Every method that is offered trains the shipped model for a few steps, on the same loop."""

from pathlib import Path

import methods_ranks
import pytest

from pipeline.methods import all_methods

RECIPE = Path(__file__).resolve().parents[2] / "configs/recipe/pm4.yaml"
METHODS = all_methods()
OFFERED = [name for name, method in METHODS.items() if not method.missing]
MORE = {  # else it would not act yet
    "stare": ["objective.stare.target=2"],
    "isentrope_clip_high": ["entropy.band.low=0.9", "entropy.band.high=1.1"],
}
NARROW = {"isentrope_clip_high": "objective.clip_high=0.02"}  # else no ratio of these few steps is clipped
ESSENCE = ("entropy", "loss", "grad_norm", "reward")


def train(gang, run_dir, *overrides):
    (steps,) = gang.run(methods_ranks.train, 1, str(RECIPE), str(run_dir), overrides)
    return [[step[name] for name in ESSENCE] for step in steps]


@pytest.fixture(scope="module")
def grpo(gang, tmp_path_factory):
    """By updates per step."""
    return {
        updates: train(
            gang,
            tmp_path_factory.mktemp("grpo") / "run",
            "entropy.controller=none",
            f"learner.updates_per_step={updates}",
        )
        for updates in (1, 2)
    }


@pytest.mark.parametrize("name", [name for name in OFFERED if name != "grpo"])
def test_trains(gang, tmp_path, grpo, name):
    """Three steps, each with a gradient, and not those of GRPO."""
    narrow = [NARROW[name]] if name in NARROW else []
    steps = train(gang, tmp_path / "run", *METHODS[name].overrides, *MORE.get(name, []), *narrow)
    assert len(steps) == 3
    assert all(grad_norm > 0 for _, _, grad_norm, _ in steps)
    assert all(0 < entropy < 2 for entropy, *_ in steps)
    updates = 2 if "learner.updates_per_step=2" in METHODS[name].overrides else 1
    off = ("entropy.controller=none", f"learner.updates_per_step={updates}")
    assert steps != (train(gang, tmp_path / "grpo", *off, *narrow) if narrow else grpo[updates])


@pytest.mark.parametrize("actuator", ["resample", "reweight", "fc", "dcpo"])
def test_alpha_zero_is_grpo_bit_for_bit(gang, tmp_path, grpo, actuator):
    assert train(gang, tmp_path / "run", f"entropy.actuator={actuator}", "entropy.alpha=0") == grpo[1]
