import json

import pytest

from megatron_ext import architecture

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_reads_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = architecture.read(tmp_path)
    assert (model.layers, model.head_dim, model.rope_theta, model.rope_factor) == (6, 8, 1000.0, None)
    assert not model.tied
    assert [model.padded_vocab(tp) for tp in (1, 2, 4)] == [101, 102, 104]


def test_missing_folder_names_the_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.hf_path=.*config\.json"):
        architecture.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},  # transformers 4
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},  # transformers 5
    ],
)
def test_both_spellings_of_rotary_scaling(rope):
    model = architecture.parse({**LLAMA, **rope})
    assert (model.rope_theta, model.rope_factor) == (5e5, 8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            r"MambaForCausalLM.*LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": None}, r"no architectures key.*known"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'.*'silu'"),
        ({"mlp_bias": True}, r"mlp_bias=True"),
        ({"use_sliding_window": True}, r"use_sliding_window=True"),
        ({"attention_bias": True}, r"attention_bias=True"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide num_attention_heads=8"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, r"rope_type='yarn'.*default, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}}, r"low_freq_factor=2\.0.*1\.0"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope_type='llama3' lacks its factor"),
    ],
)
def test_refuses_what_it_cannot_build(change, message):
    with pytest.raises(ValueError, match=message):
        architecture.parse({**LLAMA, **change})


def test_names_every_missing_key():
    with pytest.raises(ValueError, match="lacks hidden_size, vocab_size"):
        architecture.parse({key: value for key, value in LLAMA.items() if key not in ("vocab_size", "hidden_size")})


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, r"tensor_model_parallel_size=3 does not divide num_attention_heads=8"),
        (8, 1, r"tensor_model_parallel_size=8 does not divide num_key_value_heads=4"),
        (1, 4, r"pipeline_model_parallel_size=4 does not divide num_hidden_layers=6"),
    ],
)
def test_refuses_a_layout_that_does_not_fit(tp, pp, message):
    model = architecture.parse(LLAMA)
    model.check_layout(4, 3)
    with pytest.raises(ValueError, match=message):
        model.check_layout(tp, pp)
