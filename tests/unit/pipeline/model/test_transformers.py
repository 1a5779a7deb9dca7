"""What ``config.json`` means, held against transformers' own configuration classes and rotary embeddings."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import architecture
from pipeline.model.architecture import LinearScaling, Llama3Scaling, ModelError, Yarn
from pipeline.model.rotary import frequencies
from tests.tiny_folder import ARCHITECTURES, hf_config


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_absent_keys_mean_what_transformers_takes(transformers, family):
    config = hf_config(family, num_attention_heads=128, hidden_size=1024)
    for key in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta", "norm_topk_prob"):
        config.pop(key, None)
    ours, theirs = architecture.parse(config), transformers.AutoConfig.for_model(**config)
    assert ours.kv_heads == theirs.num_key_value_heads
    if family != "deepseek_v3":  # its heads have sizes of their own
        assert ours.head_dim == getattr(theirs, "head_dim", 1024 // 128)
    assert (ours.tied, ours.rope_theta) == (theirs.tie_word_embeddings, theirs.rope_parameters["rope_theta"])
    if ours.moe:
        assert ours.moe.normalize == theirs.norm_topk_prob


def test_what_an_absent_key_means_is_not_quoted_as_if_it_were_there():
    config = hf_config("qwen2", num_attention_heads=16)
    del config["num_key_value_heads"]
    with pytest.raises(
        ModelError, match=r"num_key_value_heads \(absent, so 32\) does not divide num_attention_heads=16"
    ):
        architecture.parse(config)


NUMBERS = {
    "factor": st.floats(1.0, 64.0),
    "low_freq_factor": st.floats(0.5, 2.0),
    "high_freq_factor": st.floats(2.5, 8.0),
    "original_max_position_embeddings": st.integers(16, 16384),
    "rope_theta": st.floats(100.0, 1e7),
}
OPTIONAL = ("original_max_position_embeddings", "rope_theta")
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def ropes(kinds):
    """A set of rotary parameters of one of ``kinds``, as transformers 4 or 5 spells it."""
    return st.sampled_from(kinds).flatmap(
        lambda kind: st.fixed_dictionaries(
            {name: NUMBERS[name] for name in NEEDED[kind]},
            optional={name: NUMBERS[name] for name in OPTIONAL},
        ).flatmap(lambda found: st.sampled_from(("rope_type", "type")).map(lambda key: found | {key: kind}))
    )


@st.composite
def configs(draw, kinds=("default", "linear", "llama3")):
    rope = draw(ropes(kinds))
    keys = draw(st.sampled_from([("rope_scaling",), ("rope_parameters",), ("rope_scaling", "rope_parameters")]))
    config = dict.fromkeys(keys, rope)
    if "rope_scaling" in keys and draw(st.booleans()):
        config["rope_parameters"] = draw(ropes(kinds))
    for key in OPTIONAL:
        if draw(st.booleans()):
            config[key] = draw(NUMBERS[key])
    return config


def parsed(config):
    """The model, or ``None`` where the two keys differ and are refused."""
    if {"rope_scaling", "rope_parameters"} <= set(config) and config["rope_scaling"] != config["rope_parameters"]:
        with contextlib.suppress(ModelError):  # they may still say the same, such as the default base
            return architecture.parse(config)
        with pytest.raises(ModelError, match="contradict one another"):
            architecture.parse(config)
        return None
    return architecture.parse(config)


@given(changes=configs())
@settings(max_examples=150, deadline=None)
def test_rotary_frequencies_are_transformers(transformers, changes):
    """Of every type, from whichever key they come; two keys that contradict one another are refused."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = hf_config("llama", head_dim=32)
    del config["rope_theta"]
    model = parsed(config | changes)
    if model is None:
        return
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**config | changes))
    assert theirs.attention_scaling == 1.0
    torch.testing.assert_close(frequencies(model), theirs.inv_freq, rtol=1e-6, atol=0)


@given(changes=configs(kinds=("default", "yarn")))
@settings(max_examples=100, deadline=None)
def test_yarn_is_read_as_transformers_reads_it(transformers, changes):
    """megatron-core computes it (tests/distributed compares the logits); what it is given must be transformers'
    numbers.
    """
    config = hf_config("deepseek_v3")
    del config["rope_theta"]
    model = parsed(config | changes)
    if model is None:
        return
    found = transformers.AutoConfig.for_model(**config | changes)
    found.standardize_rope_params()  # once more, as the rotary embedding does
    theirs = found.rope_parameters
    assert model.rope_theta == theirs["rope_theta"]
    if theirs["rope_type"] == "default":
        assert model.rope_scaling is None
    else:
        expected = Yarn(theirs["factor"], theirs["original_max_position_embeddings"], 32.0, 1.0, 1.0, 0.0)
        assert model.rope_scaling == expected


def test_two_keys_that_say_the_same_are_one():
    rope = {"rope_type": "linear", "factor": 4.0}
    config = hf_config("llama", rope_scaling=rope, rope_parameters={**rope, "rope_theta": 1000.0})
    assert architecture.parse(config).rope_scaling == LinearScaling(4.0)
    with pytest.raises(ModelError, match=r"rope_scaling=.*rope_parameters=.* contradict one another.*rope_scaling"):
        architecture.parse(config | {"rope_parameters": {**rope, "rope_theta": 5000.0}})


def test_llama3_without_its_length_takes_the_model_s():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert architecture.parse(hf_config("llama", rope_scaling=rope)).rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 512)
