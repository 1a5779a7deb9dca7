import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.weights import hf
from pipeline.model import layout
from pipeline.model.architecture import FAMILIES, Architecture
from pipeline.model.grid import Grid
from pipeline.model.reading import ModelError

MODEL = Architecture(FAMILIES["Qwen2ForCausalLM"], 2, 6, 8, 4, 2, 2, 7, 16, 1e-6, 1e4, None, False, qkv_bias=True)


def tensors():
    g = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(s.shape, generator=g) for r in layout.rows(MODEL) for s in r.sources}


def load(folder, tp=1, rank=0):
    rows = layout.rows(MODEL)
    parameters = {r.parameter: torch.full(r.local_shape(tp), torch.nan) for r in rows}
    topology = SimpleNamespace(grid=Grid(tp=tp), rank=rank)
    hf.load(parameters, rows, MODEL, folder, topology)
    return parameters


def test_each_rank_gets_its_heads_and_halves(tmp_path):
    source = tensors()
    save_file(source, tmp_path / "model.safetensors")
    loaded = load(tmp_path, tp=2, rank=1)
    prefix = "model.layers.1."
    q, k, v = (source[f"{prefix}self_attn.{n}_proj.bias"] for n in "qkv")
    assert torch.equal(loaded["decoder.layers.1.self_attention.linear_qkv.bias"], torch.cat([q[4:], k[2:], v[2:]]))
    gate, up = source[prefix + "mlp.gate_proj.weight"], source[prefix + "mlp.up_proj.weight"]
    assert torch.equal(loaded["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate[4:], up[4:]]))
    down = source[prefix + "mlp.down_proj.weight"]
    assert torch.equal(loaded["decoder.layers.1.mlp.linear_fc2.weight"], down[:, 4:])
    assert torch.equal(loaded["output_layer.weight"], torch.cat([source["lm_head.weight"][4:], torch.zeros(1, 6)]))


def test_recomputed_buffers_are_passed_over(tmp_path):
    save_file(
        {**tensors(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            (
                r"lacks the tensor model\.layers\.1\.self_attn\.k_proj\.weight; "
                r"needed by decoder\.layers\.1\.self_attention\.linear_qkv\.weight = "
            ),
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            (
                r"model\.norm\.weight has shape \[5\], config\.json asks for \[6\]; "
                r"needed by decoder\.final_layernorm\.weight"
            ),
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(2)}),
            r"holds 1 tensors that qwen2 does not have: model\.layers\.0\.self_attn\.q_norm\.weight",
        ),
        (
            lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[-1:].fill_(-math.inf),
            r"the tensor model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors holds NaN or infinite values",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, change, message):
    changed = tensors()
    change(changed)
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
