"""Slices written where ``engine_parameters`` says are what SGLang's own loaders write, bit for bit, in every family."""

import importlib.util
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from safetensors.torch import save_file

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the sglang extra", allow_module_level=True)

from pipeline.model import architecture, layout
from pipeline.model.fp8 import quantise_tensors, quantization_config
from tests.decoding import quantised_names
from tests.integration.sglang_models import different
from tests.tiny_folder import hf_config, write_folder

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
DEEPSEEK = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_scaling": YARN}
# Two key-value heads: four ranks share them by two.
CASES = [
    ("llama", {}, [(1, 1), (2, 1), (4, 1)]),
    ("llama", {"tie_word_embeddings": True}, [(1, 1), (2, 1)]),
    ("mistral", {}, [(2, 1)]),
    ("qwen2", {}, [(1, 1), (2, 1), (4, 1)]),
    ("qwen2", {"tie_word_embeddings": True}, [(2, 1)]),
    ("qwen3", {}, [(1, 1), (2, 1), (4, 1)]),
    ("mixtral", {}, [(1, 1), (2, 1), (2, 2)]),
    ("qwen2_moe", {}, [(1, 1), (2, 1), (2, 2)]),
    ("glm4_moe", {}, [(1, 1), (2, 1), (2, 2), (4, 2)]),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}, [(2, 1)]),
    ("qwen3_moe", {}, [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]),
    ("deepseek_v3", DEEPSEEK, [(1, 1), (2, 1), (2, 2)]),
]


@pytest.fixture(scope="module")
def fresh():
    """A process that SGLang may have for itself."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("family", "changes", "grids"), CASES)
def test_slices_land_where_sglang_puts_them(family, changes, grids, fresh, tmp_path):
    folder, tensors = write_folder(tmp_path / family, family, vocab_size=100, **changes)
    for tp, ep in grids:
        assert fresh.submit(different, folder, tensors, tp, ep).result() == [], (tp, ep)


def test_a_padded_feed_forward_has_gate_and_up_in_its_halves(fresh, tmp_path):
    """48 rows each, which SGLang pads to 64 on a CPU."""
    folder, tensors = write_folder(tmp_path / "padded", "qwen3", intermediate_size=48)
    assert fresh.submit(different, folder, tensors, 1, padded=True).result() == []


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_delta_nets_land_where_sglang_puts_them(family, fresh, tmp_path):
    """On a CPU SGLang builds them only with the heads that it counts for a padded model."""
    folder, tensors = write_folder(tmp_path / family, family, vocab_size=100)
    assert fresh.submit(different, folder, tensors, 1, padded=True).result() == []


def test_padded_heads_are_refused(fresh, tmp_path):
    """Two key-value heads on four ranks: four on a CPU, with eight query heads rather than four."""
    folder, tensors = write_folder(tmp_path / "heads", "qwen3")
    with pytest.raises(ValueError, match=r"qkv_proj\.weight' is .* pads the heads"):
        fresh.submit(different, folder, tensors, 4, padded=True).result()


FP8 = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "vocab_size": 128}
FP8 |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "quantization_config": quantization_config(),
}


@pytest.mark.parametrize(("family", "tp", "ep"), [("qwen3", 2, 1), ("qwen3_moe", 2, 1), ("qwen3_moe", 2, 2)])
def test_codes_and_scales_land_where_sglang_puts_them(family, tp, ep, fresh, tmp_path):
    plain = {key: value for key, value in FP8.items() if key != "quantization_config"}
    folder, tensors = write_folder(tmp_path / family, family, **plain)
    names = quantised_names(layout.rows(architecture.read(folder)))
    codes = quantise_tensors({name: tensor.bfloat16() for name, tensor in tensors.items()}, names)
    save_file(codes, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(family, **FP8, torch_dtype="bfloat16")))
    assert fresh.submit(different, folder, codes, tp, ep, "fp8").result() == []
