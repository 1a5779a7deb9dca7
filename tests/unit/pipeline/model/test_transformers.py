"""What ``config.json`` means, held against transformers' own configuration classes and rotary embeddings."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import architecture
from pipeline.model.architecture import Window
from pipeline.model.reading import ModelError
from pipeline.model.rope import LinearScaling, Llama3Scaling, Yarn
from pipeline.model.rotary import attention_factor, frequencies
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
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 128)
    assert (ours.tied, ours.rope_theta) == (theirs.tie_word_embeddings, theirs.rope_parameters["rope_theta"])
    if ours.moe:
        assert ours.moe.normalize == getattr(theirs, "norm_topk_prob", True)  # Mixtral always normalises


def test_what_an_absent_key_means_is_not_quoted_as_if_it_were_there():
    config = hf_config("qwen2", num_attention_heads=16)
    del config["num_key_value_heads"]
    with pytest.raises(
        ModelError, match=r"num_key_value_heads \(absent, so 32\) does not divide num_attention_heads=16"
    ):
        architecture.parse(config)


WINDOWS = [
    {},
    {"max_window_layers": 3},
    {"max_window_layers": 0, "sliding_window": 7},
    {"max_window_layers": 99},
    {"sliding_window": 1000},  # as long as a row may be
    {"use_sliding_window": False, "max_window_layers": 1},
]
NAMED = {"layer_types": ["full_attention"] * 5 + ["sliding_attention"]}


@pytest.mark.parametrize(
    ("family", "said"),
    [
        *((family, said) for family in ("qwen2", "qwen3", "qwen2_moe") for said in [*WINDOWS, NAMED]),
        *(("qwen3_moe", said) for said in WINDOWS),
    ],
    ids=str,
)
def test_qwens_windows_are_those_of_transformers(transformers, family, said):
    """``max_window_layers`` means something else in every class."""
    values = {"num_hidden_layers": 6, "use_sliding_window": True, "max_position_embeddings": 1000, "sliding_window": 9}
    config = hf_config(family) | values | said
    theirs = transformers.AutoConfig.for_model(
        family, **{key: value for key, value in config.items() if key != "model_type"}
    )
    kinds = theirs.to_dict().get("layer_types") or ["sliding_attention"] * 6
    layers = tuple(kind == "sliding_attention" for kind in kinds)
    used = theirs.sliding_window and theirs.sliding_window < 1000 and any(layers)
    assert architecture.parse(config).window == (Window(layers, theirs.sliding_window) if used else None)


NUMBERS = {
    "factor": st.floats(1.0, 64.0),
    "low_freq_factor": st.floats(0.5, 2.0),
    "high_freq_factor": st.floats(2.5, 8.0),
    "original_max_position_embeddings": st.integers(16, 16384),
    "rope_theta": st.floats(100.0, 1e7),
    "short_factor": st.lists(st.floats(0.5, 8.0), min_size=16, max_size=16),
    "long_factor": st.lists(st.floats(0.5, 8.0), min_size=16, max_size=16),
    "attention_factor": st.floats(0.5, 2.0),
    "beta_fast": st.floats(8.0, 64.0),
    "beta_slow": st.floats(0.5, 4.0),
    "mscale": st.floats(0.0, 2.0),
    "mscale_all_dim": st.floats(0.0, 2.0),
    "truncate": st.booleans(),
}
ANYWHERE = ("original_max_position_embeddings", "rope_theta")  # within the key's numbers or beside it
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
LATENT = ("attention_factor", "truncate")  # which megatron-core's latent attention does not take


def ropes(kinds, without):
    """A set of rotary parameters of one of ``kinds``, as transformers 4 or 5 spells it."""
    return st.sampled_from(kinds).flatmap(
        lambda kind: st.fixed_dictionaries(
            {name: NUMBERS[name] for name in NEEDED[kind]},
            optional={name: NUMBERS[name] for name in (*ANYWHERE, *OPTIONAL.get(kind, ())) if name not in without},
        ).flatmap(lambda found: st.sampled_from(("rope_type", "type")).map(lambda key: found | {key: kind}))
    )


@st.composite
def configs(draw, kinds=tuple(NEEDED), without=()):
    rope = draw(ropes(kinds, without))
    keys = draw(st.sampled_from([("rope_scaling",), ("rope_parameters",), ("rope_scaling", "rope_parameters")]))
    config = dict.fromkeys(keys, rope)
    if "rope_scaling" in keys and draw(st.booleans()):
        config["rope_parameters"] = draw(ropes(kinds, without))
    for key in ANYWHERE:
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


@given(changes=configs(), family=st.sampled_from(("llama", "glm4_moe")))
@settings(max_examples=400, deadline=None)
def test_rotary_frequencies_are_transformers(transformers, changes, family):
    """Of every type, from whichever key they come; two keys that contradict one another are refused."""
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = {"llama": LlamaRotaryEmbedding, "glm4_moe": Glm4MoeRotaryEmbedding}[family]
    config = hf_config(family, head_dim=32 if family == "llama" else 64)  # of which glm4_moe rotates a half
    del config["rope_theta"]
    model = parsed(config | changes)
    if model is None:
        return
    theirs = embedding(transformers.AutoConfig.for_model(**config | changes))
    assert (model.rotary_dim, len(theirs.inv_freq)) == (32, 16)
    assert attention_factor(model) == pytest.approx(theirs.attention_scaling, rel=1e-12)
    torch.testing.assert_close(frequencies(model), theirs.inv_freq, rtol=2e-6, atol=0)
    _equals_at_all_positions(model, theirs)


def _equals_at_all_positions(model, theirs):
    """transformers changes frequencies beyond a length; no position of ``max_positions`` is beyond it."""
    positions = torch.arange(model.max_positions)[None]
    cosine, sine = theirs(torch.zeros(1), positions)
    angles = positions[0][:, None] * frequencies(model).double()
    for ours, found in ((angles.cos(), cosine), (angles.sin(), sine)):
        torch.testing.assert_close(
            (ours * attention_factor(model)).float(), found[0, :, : model.rotary_dim // 2], rtol=0, atol=2e-3
        )


@given(share=st.sampled_from([0.25, 0.5, 0.75, 1.0, 0.3]), where=st.sampled_from(["top", "rope", "both"]))
def test_the_rotated_part_of_a_head_is_transformers(transformers, share, where):
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    config = hf_config("glm4_moe", head_dim=32)
    del config["partial_rotary_factor"], config["rope_theta"]
    if where != "rope":
        config["partial_rotary_factor"] = share
    if where != "top":
        config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": share}
    if int(32 * share) % 2:
        with pytest.raises(ModelError, match=f"partial_rotary_factor={share} of head_dim=32 rotates 9 entries"):
            architecture.parse(config)
        return
    theirs = Glm4MoeRotaryEmbedding(transformers.AutoConfig.for_model(**config))
    torch.testing.assert_close(frequencies(architecture.parse(config)), theirs.inv_freq, rtol=1e-6, atol=0)


@given(changes=configs(kinds=("default", "yarn"), without=LATENT))
@settings(max_examples=100, deadline=None)
def test_yarn_is_read_as_transformers_reads_it(transformers, changes):
    """megatron-core computes it (tests/distributed compares the logits); what it is given must be transformers'
    numbers.
    """
    config = hf_config("deepseek_v3")
    del config["rope_theta"]
    if any(bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")) for rope in _given(changes)):
        with pytest.raises(ModelError, match=r"only one of mscale|contradict one another"):
            architecture.parse(config | changes)
        return
    model = parsed(config | changes)
    if model is None:
        return
    found = transformers.AutoConfig.for_model(**config | changes)
    found.standardize_rope_params()  # once more, as the rotary embedding does
    theirs = found.rope_parameters
    assert model.rope_theta == theirs["rope_theta"]
    if theirs["rope_type"] == "default":
        assert model.rope_scaling is None
        return
    named = ("factor", "original_max_position_embeddings")
    expected = Yarn(
        *(theirs[name] for name in named),
        theirs.get("beta_fast", 32.0),
        theirs.get("beta_slow", 1.0),
        theirs.get("mscale") or 1.0,
        theirs.get("mscale_all_dim") or 0.0,
        attention_factor(model),  # compared above
    )
    assert model.rope_scaling == expected


def _given(changes):
    return [
        rope for key in ("rope_scaling", "rope_parameters") if (rope := changes.get(key)) and "yarn" in rope.values()
    ]


def test_two_keys_that_say_the_same_are_one():
    rope = {"rope_type": "linear", "factor": 4.0}
    config = hf_config("llama", rope_scaling=rope, rope_parameters={**rope, "rope_theta": 1000.0})
    assert architecture.parse(config).rope_scaling == LinearScaling(4.0)
    with pytest.raises(ModelError, match=r"rope_scaling=.*rope_parameters=.* contradict one another.*rope_scaling"):
        architecture.parse(config | {"rope_parameters": {**rope, "rope_theta": 5000.0}})


def test_llama3_without_its_length_takes_the_model_s():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert architecture.parse(hf_config("llama", rope_scaling=rope)).rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 512)
