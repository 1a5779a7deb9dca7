"""Folders that are not what they say: refused by name, with what to do."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_ext.weights import convert
from pipeline.config.schema import ALL_LINEAR, LORA_MODULES, LoraConfig
from pipeline.model import architecture, layout, lora, stacked
from pipeline.model.folder import INDEX, Folder, check, is_weights, write_index
from pipeline.model.fp8 import quantise_tensors, quantization_config, values
from pipeline.model.grid import Grid
from pipeline.model.reading import ModelError
from tests.decoding import quantised_names
from tests.tiny_folder import hf_config, write_folder, write_seeing_folder


def checked(path):
    model = architecture.read(path)
    folder = Folder(path, model)
    check(folder, layout.rows(model), model)
    return folder


def test_a_stale_index_beside_one_file_is_refused(tmp_path):
    """transformers would read the one file, others the files of the index."""
    path, tensors = write_folder(tmp_path, "llama")
    shards = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path / "model-00001-of-00001.safetensors")
    write_index(path, shards, 0)
    with pytest.raises(ModelError, match=rf"{path}: model\.safetensors lies beside .*00001-of-00001.*: remove"):
        checked(path)
    (path / "model.safetensors").unlink()
    assert torch.equal(checked(path).tensor("model.norm.weight"), tensors["model.norm.weight"] + 1)


def test_the_index_of_the_one_file_itself_is_fine(tmp_path):
    path, tensors = write_folder(tmp_path, "llama")
    write_index(path, dict.fromkeys(tensors, "model.safetensors"), 0)
    assert checked(path).names() == set(tensors)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no index"), ("{}", "no index"), ('{"weight_map": []}', "no index"), ('"x"', "no index")],
)
def test_a_damaged_index_is_refused(tmp_path, text, message):
    path, _ = write_folder(tmp_path, "llama")
    (path / INDEX).write_text(text)
    with pytest.raises(ModelError, match=rf"index\.json: {message}.*download it again"):
        Folder(path, architecture.read(path))


def test_an_index_of_other_tensors_is_refused(tmp_path):
    path, tensors = write_folder(tmp_path, "llama")
    (path / "model.safetensors").rename(path / "a.safetensors")
    write_index(path, dict.fromkeys(tensors.keys() - {"model.norm.weight"}, "a.safetensors"), 0)
    with pytest.raises(ModelError, match=r"disagree on model\.norm\.weight"):
        Folder(path, architecture.read(path))
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, path / "b.safetensors")
    write_index(path, dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}, 0)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is in a\.safetensors and in b\.safetensors"):
        Folder(path, architecture.read(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_output_layer_must_be_the_embedding(tmp_path, dtype):
    """45 nats off otherwise: transformers takes the embedding, the stored head is dropped."""
    path, tensors = write_folder(tmp_path, "llama", tie_word_embeddings=True)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
    checked(path)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
    said = r"tie_word_embeddings is true .* lm_head\.weight differs from model\.embed_tokens\.weight: set .* to false"
    with pytest.raises(ModelError, match=said):
        checked(path)
    save_file({**tensors, "lm_head.weight": head[:3].clone()}, path / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        checked(path)


def test_multi_token_prediction_is_left_out_and_said_so(tmp_path, caplog):
    path, tensors = write_folder(tmp_path, "deepseek_v3", num_nextn_predict_layers=1)
    ahead = {f"model.layers.2.{name}": torch.ones(2) for name in ("eh_proj.weight", "self_attn.o_proj.weight")}
    save_file({**tensors, **ahead}, path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        checked(path)
    assert f"{path}: 2 tensors of its multi-token-prediction layers are left out" in caplog.text
    (path / "config.json").write_text(json.dumps(hf_config("deepseek_v3")))
    with pytest.raises(ModelError, match="2 tensors that deepseek_v3 does not have"):
        checked(path)
    path, tensors = write_folder(tmp_path / "next", "qwen3_next")
    save_file({**tensors, "mtp.fc.weight": torch.ones(2)}, path / "model.safetensors")
    checked(path)
    assert f"{path}: 1 tensors of its multi-token-prediction layers are left out" in caplog.text


@pytest.mark.parametrize("experts", ["each", "stacked"])
def test_the_model_of_text_is_read_out_of_one_that_also_sees(experts, tmp_path, caplog):
    tensors = write_seeing_folder(tmp_path / "seeing", experts)
    with caplog.at_level(logging.WARNING):
        folder = checked(tmp_path / "seeing")
    assert "1 tensors that turn pictures into embeddings are left out" in caplog.text
    assert folder.names() - tensors.keys() == {"model.visual.patch_embed.proj.bias", "mtp.norm.weight"}
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in tensors.items())
    assert architecture.read(tmp_path / "seeing") == architecture.parse(hf_config("qwen3_5_moe_text"))


def test_tensors_of_eight_bits_are_refused(tmp_path):
    path, tensors = write_folder(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.weight is torch\.float8_e4m3fn, without .*_scale_inv .*16 or 32"):
        checked(path)


def _in_fp8(path, **changes):
    """A folder as DeepSeek-V3's: matrices as codes and scales; what the codes stand for, in bfloat16."""
    sizes = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 160, "q_lora_rank": 136}
    path, tensors = write_folder(path, "deepseek_v3", **sizes, quantization_config=quantization_config(), **changes)
    names = quantised_names(layout.rows(architecture.read(path)))
    stored = quantise_tensors({name: tensor.bfloat16() for name, tensor in tensors.items()}, names)
    save_file(stored, path / "model.safetensors")
    return path, stored, {name: tensor.bfloat16() for name, tensor in values(stored).items()}


def test_codes_in_blocks_are_read_as_their_values(tmp_path):
    path, stored, expected = _in_fp8(tmp_path)
    folder = checked(path)
    assert folder.names() == expected.keys() < stored.keys()
    for name, tensor in expected.items():
        assert (folder.dtype(name), folder.shape(name)) == (torch.bfloat16, tuple(tensor.shape))
        assert torch.equal(folder.tensor(name), tensor), name
        assert torch.equal(folder.stored(name).view(torch.uint8), stored[name].view(torch.uint8))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_slice_of_codes_is_that_of_their_values(tmp_path_factory, data):
    if not hasattr(test_any_slice_of_codes_is_that_of_their_values, "made"):
        made = _in_fp8(tmp_path_factory.mktemp("codes"))
        test_any_slice_of_codes_is_that_of_their_values.made = checked(made[0]), made[2]
    folder, expected = test_any_slice_of_codes_is_that_of_their_values.made
    name = data.draw(st.sampled_from(sorted(expected)))
    dim = data.draw(st.integers(0, expected[name].ndim - 1))
    start = data.draw(st.integers(0, expected[name].shape[dim] - 1))
    length = data.draw(st.integers(1, expected[name].shape[dim] - start))
    assert torch.equal(folder.read(name, dim, start, length), expected[name].narrow(dim, start, length))


def _in_mxfp4(path):
    """A folder as gpt-oss's: random codes of experts; its model, what is in it, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = {"hidden_size": 64, "intermediate_size": 96, "quantization_config": {"quant_method": "mxfp4"}}
    path, tensors = write_folder(path, "gpt_oss", **config)
    model, generator = architecture.read(path), torch.Generator().manual_seed(1)
    stored = {name: tensor.bfloat16() for name, tensor in stacked.stack(tensors, model).items()}
    values = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(110, 130, (experts, out, width // 32), dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, path / "model.safetensors")
    return path, model, stored, values


def test_mxfp4_codes_are_read_as_their_values_and_written_as_bfloat16(tmp_path):
    path, model, _, expected = _in_mxfp4(tmp_path / "codes")
    folder = Folder(path, model)
    check(folder, layout.rows(model), model)
    assert folder.names() == layout.tensor_shapes(model).keys()
    read = {name: folder.tensor(name) for name in folder.names()}
    assert {folder.dtype(name) for name in read} == {torch.bfloat16}
    assert all(folder.shape(name) == tuple(tensor.shape) for name, tensor in read.items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stacked.stack(read, model).items())
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(read[up], expected["model.layers.1.mlp.experts.gate_up_proj"][3, :, 1::2].T)
    assert torch.equal(folder.read(up, 1, 5, 40), read[up][:, 5:45])
    convert.hf_to_megatron(path, tmp_path / "m", Grid(tp=2))
    convert.megatron_to_hf(tmp_path / "m", path, tmp_path / "back", part_bytes=5000)
    assert "quantization_config" not in architecture.read_config(tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    with pytest.raises(ValueError, match="--dtype fp8 is not supported for gpt_oss"):
        convert.megatron_to_hf(tmp_path / "m", path, tmp_path / "again", "fp8")


def test_experts_of_another_shape_and_codes_without_scales_are_refused(tmp_path):
    path, model, stored, _ = _in_mxfp4(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj_"
    save_file(stored | {name + "scales": stored[name + "scales"][:, :3].contiguous()}, path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}scales has shape \[4, 3, 3\], config.json asks for \[4, 64, 3\]"):
        Folder(path, model)
    save_file({key: tensor for key, tensor in stored.items() if key != name + "scales"}, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight"):
        checked(path)


def test_scales_of_other_blocks_are_refused(tmp_path):
    path, stored, _ = _in_fp8(tmp_path)
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(stored | {scale: stored[scale][:1].contiguous()}, path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{scale} is torch.float32 \[1, 2\], not float32 \[3, 2\].*128x128"):
        Folder(path, architecture.read(path))


def test_which_files_are_weights(tmp_path):
    weights = (
        "model.safetensors",
        INDEX,
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "a-00001-of-00002.safetensors",
    )
    assert all(is_weights(tmp_path / name) for name in weights)
    assert not any(is_weights(tmp_path / name) for name in ("config.json", "tokenizer.json", "vocab.txt", "merges.txt"))


def test_only_a_folder_that_has_stacked_experts_is_searched_for_their_parts(tmp_path):
    write_folder(tmp_path, "qwen3_moe")
    stacked.parts.cache_clear()
    checked(tmp_path)
    assert stacked.parts.cache_info().misses == 0


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_whether_an_expert_has_an_adapter(family):
    model, config = architecture.parse(hf_config(family)), LoraConfig()
    for config.rank in (0, 4):
        for target in (ALL_LINEAR, *LORA_MODULES):
            config.targets = [target]
            found = [each for each in lora.adapters(model, Grid(), config) if each.base.expert is not None]
            assert lora.beside_experts(model, config) == bool(found)
