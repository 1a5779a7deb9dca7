"""What an import brings with it: plans and the resharding load no megatron, and leave torch as torch's authors wrote
it.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Torch is looked at before all ``acts`` and after each; a name counts as patched where its object is another one then.
LOOK = """
import json, sys
import torch, torch.distributed, torch.nn.functional

ENGINE_ROOM = ("megatron", "megatron_ext", "transformer_engine", "sglang", "ray")
PLACES = (torch, torch.Tensor, torch.cuda, torch.distributed, torch.nn.functional)

def names():
    return {f"{place.__name__}.{name}": id(value) for place in PLACES for name, value in vars(place).items()}

before, found = names(), {}
for name, act in json.loads(sys.argv[1]).items():
    try:
        exec(act)
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
    after = names()
    patched = [each for each in before if after.get(each) != before[each]]
    foreign = [each for each in ENGINE_ROOM if each in sys.modules]
    found[name] = {"patched": patched, "foreign": foreign}
print(json.dumps(found))
"""
CLEAN = {"patched": [], "foreign": []}


def brought_by(acts: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """By name, after each of ``acts``: ``patched``, names of torch that it or one before replaced; ``foreign``, what
    else of the engine room is loaded.
    """
    command = [sys.executable, "-c", LOOK, json.dumps(acts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def modules_of(folder: str) -> list[str]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


PLANS = (
    ["weights", "--model", "qwen3-32b", "--learner", "tp=8,pp=4", "--engines", "tp=8,count=4"],
    ["learner", "--config", "recipe/qwen3-32b.yaml"],
    ["run", "--config", "recipe/qwen3-32b.yaml", "--cluster", "cluster/pyxis.yaml", "cluster.save_before_s=1200"],
)


def test_plans_and_the_resharding_load_no_megatron_and_patch_nothing():
    """Neither by their imports nor by what they do; the CPU shim at the end shows that the looks can fail."""
    acts = {}
    for folder in ("pipeline/reshard", "launchers/plan"):
        modules = modules_of(folder)
        assert len(modules) > 5
        acts[folder] = f"import {', '.join(modules)}"
    for words in PLANS:
        acts[f"isentrope plan {words[0]}"] = f"from launchers.cli.main import run; run({['plan', *words]!r})"
    assert len(acts) == 5
    every = brought_by(acts | {"shim": "import megatron_ext"})
    found = every.pop("shim")
    assert every == dict.fromkeys(acts, CLEAN)
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
