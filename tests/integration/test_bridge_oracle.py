"""megatron-bridge as an oracle: from the same Hugging Face folder it makes bitwise the same Megatron tensors, and we
read its checkpoints.

Needs `make bridge-env`.
"""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from megatron_ext.weights import convert, hf
from pipeline.model import architecture, layout
from pipeline.model.grid import Grid

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-bridge/bin/python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no environment with megatron-bridge: run `make bridge-env`"
)
# Norms and biases are random (tiny_models), the vocabulary is odd, two key-value heads serve four. Of a Qwen3-MoE's
# dense layers (mlp_only_layers) megatron-bridge 0.6.2 makes expert layers.
FOLDERS = {name: {} for name in ("qwen3", "qwen2", "llama", "llama_tied", "mistral")} | {
    "qwen3_moe": {"mlp_only_layers": []}
}


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return [tiny_models.write(root / name, tiny_models.config(name, **changes)) for name, changes in FOLDERS.items()]


def bridge(*arguments, asked=()):
    done = subprocess.run(
        [str(word) for word in (PYTHON, ROOT / "tools/bench/bridge.py", *arguments)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        input="".join(f"{json.dumps([str(word) for word in line])}\n" for line in asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(500)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_same_tensors_on_every_rank(tmp_path, hf_folders, tp):
    bridge("tensors", "--tp", tp, tmp_path, *hf_folders)
    for folder in hf_folders:
        model, grid = architecture.read(folder), Grid(tp=tp)
        rows = layout.rows(model, grid)
        for rank in range(tp):
            ours = {row.parameter: torch.full(row.local_shape(tp), torch.nan) for row in rows}
            hf.load(ours, rows, model, folder, SimpleNamespace(grid=grid, rank=rank))
            theirs = load_file(tmp_path / f"{folder.name}-{rank}.safetensors")
            theirs = {layout.canonical(name): tensor for name, tensor in theirs.items()}
            assert ours.keys() == theirs.keys(), folder.name
            assert not [name for name in ours if not torch.equal(ours[name], theirs[name])], folder.name


@pytest.mark.timeout(500)
def test_its_checkpoint_is_read_back_bit_for_bit(tmp_path, hf_folders):
    """By us, from the torch_dist folder that it wrote; and by itself."""
    folder = hf_folders[0]
    there, back = ("there", tmp_path / "megatron"), ("back", tmp_path / "megatron", tmp_path / "hf")
    bridge("convert", folder, asked=[there, back])
    convert.megatron_to_hf(tmp_path / "megatron/iter_0000000", folder, tmp_path / "ours")
    source = load_file(folder / "model.safetensors")
    for made in (tmp_path / "ours", tmp_path / "hf"):
        tensors = load_file(made / "model.safetensors")
        assert tensors.keys() == source.keys()
        assert all(torch.equal(tensors[name], source[name]) for name in source)
