"""Converted checkpoints in real Megatron models at any layout; a learner's checkpoint as a Hugging Face folder."""

import json

import convert_ranks
import pytest
import tiny_models
import torch

from launchers.cli.main import run
from megatron_ext.weights import convert
from pipeline.model import architecture
from pipeline.model import folder as safetensors_io
from pipeline.model.grid import Grid


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "gpt_oss", "deepseek_v3", "deepseek_plain_query"],
)
def test_stored_as_megatron_stores_it(gang, tmp_path, name):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config(name))
    (different,) = gang.run(convert_ranks.stored_as_megatron_does, 1, folder, tmp_path)
    assert not different


LAYOUTS = {  # name, written for tp, pp, ep; loaded at tp, pp, dp, ep, etp
    "tied, padded vocabulary": ("qwen2", (4, 1, 1), (2, 2, 1, 1, None)),
    "untied, padded vocabulary": ("llama", (1, 4, 1), (2, 1, 1, 1, None)),
    "expert parallel": ("qwen3_moe", (2, 2, 4), (1, 1, 2, 2, None)),
    "expert tensor parallel": ("qwen3_moe", (1, 1, 1), (2, 1, 1, 1, 2)),
    "expert parallel over TP": ("qwen3_moe", (4, 1, 1), (2, 1, 1, 2, 1)),
    "delta nets": ("qwen3_next", (2, 2, 2), (4, 1, 1, 1, 1)),
    "experts with biases": ("gpt_oss", (2, 2, 2), (2, 1, 1, 2, 1)),
    "latent attention": ("deepseek_v3", (4, 2, 2), (1, 2, 2, 2, None)),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_loads_at_another_layout(gang, tmp_path, case):
    name, (tp, pp, ep), (to_tp, to_pp, dp, to_ep, to_etp) = LAYOUTS[case]
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config(name))
    convert.hf_to_megatron(folder, tmp_path / "m", Grid(tp=tp, pp=pp, dp=ep, ep=ep))
    world = to_tp * to_pp * dp
    load = (convert_ranks.load_elsewhere, world, folder, tmp_path / "m", to_tp, to_pp, to_ep, to_etp)
    assert gang.run(*load) == [[]] * world


@pytest.mark.parametrize(("name", "dtype"), [("qwen3", None), ("llama_tied", "bf16"), ("deepseek_v3", None)])
def test_verify_compares_logits(gang, tmp_path, name, dtype):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config(name))
    (said,) = gang.run(convert_ranks.verified, 1, folder, tmp_path, dtype)
    for direction in said:
        assert direction.startswith("tensors; logits within ")
        assert float(direction.split()[-1]) < 1e-4


CONFIG = "name: test\nmodel: {{hf_path: {}}}\n"


@pytest.mark.parametrize(("tp", "pp", "dtype"), [(2, 1, "fp32"), (1, 2, "bf16")])
def test_a_runs_checkpoint_equals_the_learners_export(gang, tmp_path, tp, pp, dtype):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("qwen2"))
    run_dir = tmp_path / "run"
    saved = run_dir / "checkpoints" / "step-00000002" / "learner"
    expected, _ = gang.run(convert_ranks.save_after_an_update, 2, folder, saved, tp, pp, {"dtype": dtype})
    (run_dir / "config.yaml").write_text(CONFIG.format(folder))
    for place in (run_dir, saved, saved.parent):
        out = tmp_path / f"out-{place.name}"
        with pytest.raises(SystemExit) as ended:
            run(["convert", "megatron-to-hf", "--checkpoint", str(place), "--out", str(out), "--json"])
        assert ended.value.code == 0
        written = safetensors_io.Folder(out, architecture.read(out))
        assert written.names() == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(written.read(name, 0, 0, tensor.shape[0]), tensor)
            assert written.dtype(name) == tensor.dtype


def test_a_changed_config_json_stops_the_resume(gang, tmp_path):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("llama"))
    gang.run(convert_ranks.save_after_an_update, 1, folder, tmp_path / "saved", 1, 1, {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0, "rms_norm_eps": 1e-6}))
    (said,) = gang.run(convert_ranks.refusal_to_restore, 1, folder, tmp_path / "saved")
    assert "rope_theta: checkpoint 1000.0, config.json 500.0" in said
    assert "norm_eps: checkpoint 1e-05, config.json 1e-06" in said
    assert "layers" not in said
