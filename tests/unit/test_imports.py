"""What an import brings with it: plans and the resharding load no megatron, and leave torch as torch's authors wrote
it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# ``act`` runs between two looks at torch; a name counts as patched where its object is another one afterwards.
LOOK = """
import json, sys
import torch, torch.distributed, torch.nn.functional

PLACES = (torch, torch.Tensor, torch.cuda, torch.distributed, torch.nn.functional)

def names():
    return {f"{place.__name__}.{name}": id(value) for place in PLACES for name, value in vars(place).items()}

before = names()
try:
    %s
except SystemExit as ended:
    assert not ended.code, ended.code
after = names()
patched = [name for name in before if after.get(name) != before[name]]
foreign = [name for name in ("megatron", "megatron_ext", "transformer_engine", "sglang", "ray") if name in sys.modules]
print(json.dumps({"patched": patched, "foreign": foreign}))
"""


def brought_by(act: str) -> dict[str, list[str]]:
    """``patched``: names of torch that ``act`` replaced; ``foreign``: what else of the engine room it loaded."""
    done = subprocess.run([sys.executable, "-c", LOOK % act], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def modules_of(folder: str) -> list[str]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize("folder", ["pipeline/reshard", "launchers/plan"])
def test_plans_and_the_resharding_load_no_megatron_and_patch_nothing(folder):
    modules = modules_of(folder)
    assert len(modules) > 5
    assert brought_by(f"import {', '.join(modules)}") == {"patched": [], "foreign": []}


@pytest.mark.parametrize(
    "words",
    [
        ["weights", "--model", "qwen3-32b", "--learner", "tp=8,pp=4", "--engines", "tp=8,count=4"],
        ["learner", "--config", "recipe/qwen3-32b.yaml"],
        ["run", "--config", "recipe/qwen3-32b.yaml", "--cluster", "cluster/pyxis.yaml", "cluster.save_before_s=1200"],
    ],
    ids=lambda words: words[0],
)
def test_isentrope_plan_loads_no_megatron_and_patches_nothing(words):
    act = f"from launchers.cli.main import run; run({['plan', *words]!r})"
    assert brought_by(act) == {"patched": [], "foreign": []}


def test_what_patches_torch_is_seen():
    """The looks above can fail: the CPU shim is what they look for."""
    found = brought_by("import megatron_ext")
    assert "torch.zeros" in found["patched"]
    assert "megatron_ext" in found["foreign"]


def test_planning_the_weights_way_needs_no_torch():
    modules = [f"pipeline.reshard.{name}" for name in ("plan", "order", "report", "pieces", "engine_grid")]
    act = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", act], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_loads_little_before_it_knows_what_to_do():
    """`isentrope --help` takes less than 0.3 s of computing without these."""
    heavy = (
        "omegaconf",
        "yaml",
        "launchers.slurm",
        "pipeline.config.schema",
        "torch",
        "numpy",
        "matplotlib",
        "transformers",
        "httpx",
        "ray",
        "math_verify",
        "rich.progress",
    )
    look = f"import sys, launchers.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
