import json
import math
import pickle
import subprocess
import sys

import pytest

from pipeline.model import architecture
from pipeline.model.architecture import FAMILIES, DeltaNet, Mla, Moe, Window
from pipeline.model.grid import Grid
from pipeline.model.layout import tensor_shapes
from pipeline.model.reading import ModelError
from pipeline.model.rope import Llama3Scaling, Yarn
from tests.tiny_folder import ARCHITECTURES, hf_config

LLAMA = {
    "model_type": "llama",
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
    assert (model.layers, model.head_dim, model.rope_theta, model.rope_scaling) == (6, 8, 1000.0, None)
    assert not model.tied
    assert [model.padded_vocab(tp) for tp in (1, 2, 4)] == [101, 102, 104]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "this folder has no config.json"),
        ("{", "config.json is not JSON"),
        ("[]", "config.json is not a JSON object"),
        (json.dumps(LLAMA | {"hidden_act": "gelu"}), "hidden_act='gelu'"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"^{tmp_path}: .*{message}"):
        architecture.read(tmp_path)
    with pytest.raises(ModelError, match=r"nowhere: no such folder: .*download or convert"):
        architecture.read(tmp_path / "nowhere")


def test_every_refusal_is_told_at_once_and_survives_pickling():
    """Learners raise it in other processes."""
    with pytest.raises(ModelError) as caught:
        architecture.parse(LLAMA | {"hidden_act": "gelu", "mlp_bias": True, "hidden_size": None, "vocab_size": -1})
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    problems = [refusal.problem for refusal in error.refusals]
    assert len(problems) == 4
    assert all(refusal.remedy for refusal in error.refusals)
    for words in ("hidden_act='gelu'", "mlp_bias=True", "vocab_size=-1 is not a whole", "does not say hidden_size"):
        assert sum(words in problem for problem in problems) == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},  # transformers 4
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},  # transformers 5
    ],
)
def test_both_spellings_of_rotary_scaling(rope):
    model = architecture.parse({**LLAMA, **rope})
    assert (model.rope_theta, model.rope_scaling) == (5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            r"architectures \['MambaForCausalLM'\] is not supported for model_type 'llama'.*'LlamaForCausalLM'",
        ),
        ({"architectures": None}, r"architectures None"),
        ({"architectures": "LlamaForCausalLM"}, r"architectures 'LlamaForCausalLM'"),
        (
            {"model_type": "mamba"},
            r"model_type 'mamba'.*llama, mistral, qwen2, .*deepseek_v3, kimi_k2, qwen3_5, qwen3_5_moe",
        ),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'.*'silu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types with sliding_attention"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config \(quant_method 'fp8', weight_block_size None\).*16 or 32 bits",
        ),
        ({"head_dim": None, "hidden_size": 68}, r"hidden_size=68 is not a multiple of num_attention_heads=8"),
        ({"num_attention_heads": 8.0}, r"num_attention_heads=8\.0 is not a whole number"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps=0 is not a number above 0"),
        ({"rope_theta": None}, r"rope_theta=None is not a number"),
        ({"rope_scaling": "llama3"}, r"rope_scaling='llama3'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"one set of numbers for all layers"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"mlp_bias": True}, r"mlp_bias=True"),
        ({"use_sliding_window": True}, r"use_sliding_window=True"),  # only Qwen's classes read it
        ({"attention_bias": True}, r"attention_bias=True"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide num_attention_heads=8"),
        ({"rope_scaling": {"type": "su", "factor": 4}}, r"rope_type='su'.*default or linear or .*longrope"),
        ({"rope_scaling": {"type": "dynamic"}}, r"dynamic rope needs numbers above 0, but has factor=None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": -1}}, r"yarn rope .*attention_factor=-1"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
            r"longrope rope needs 4 numbers above 0 in short_factor, but has \[1\.0\]",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": "long"}},
            r"longrope rope needs 4 numbers above 0 in long_factor, but has 'long'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": [2.0]}}, r"one set of numbers for all layers"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            r"high_freq_factor=4 at or below",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"llama3 rope needs .*factor=None, low_freq_factor=None, high"),
    ],
)
def test_refuses_what_it_cannot_build(change, message):
    with pytest.raises(ValueError, match=message):
        architecture.parse({**LLAMA, **change})


def test_names_every_missing_key():
    with pytest.raises(ValueError, match="does not say hidden_size, vocab_size"):
        architecture.parse({key: value for key, value in LLAMA.items() if key not in ("vocab_size", "hidden_size")})


def test_qwen3_moe_s_layers_and_router():
    """Layer i has experts where decoder_sparse_step divides i + 1, unless mlp_only_layers names it."""
    config = hf_config("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    expected = Moe((False, True, False, False, False, True), experts=4, ffn=32, top_k=2, normalize=True)
    assert architecture.parse(config).moe == expected
    respelt = {key: value for key, value in config.items() if key != "num_experts"} | {"num_local_experts": 4}
    assert architecture.parse(respelt).moe == expected
    assert not architecture.parse({**config, "norm_topk_prob": False}).moe.normalize


def test_deepseek_v3_s_experts_and_latent_attention():
    model = architecture.parse(hf_config("deepseek_v3", n_shared_experts=2, num_hidden_layers=3))
    assert model.moe == Moe(
        (False, True, True),
        4,
        32,
        2,
        shared_ffn=64,
        expert_bias=True,
        sigmoid=True,
        scaling=2.5,
        groups=1,
        top_groups=1,
    )
    assert model.mla == Mla(q_lora=24, kv_lora=32, nope_dim=16, rope_dim=8, v_dim=16)
    assert architecture.parse(hf_config("deepseek_v3", q_lora_rank=None)).mla.q_lora == 0
    assert model.sizes()["mla_q"] == 4 * (16 + 8)
    assert model.sizes()["mla_kv"] == 4 * (16 + 16)
    assert model.sizes()["kv_lora_rope"] == 32 + 8


YARN = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096, **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096, "rope_theta": 1e3, **YARN}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_deepseek_v3_s_rotary_scaling(rope):
    model = architecture.parse(hf_config("deepseek_v3", **rope))
    assert model.rope_scaling == Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert model.rope_theta == 1000.0


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window=0 is not a whole number"),
        ("qwen3_moe", {"num_experts": None, "num_local_experts": ...}, "does not say num_experts"),
        ("qwen3_moe", {"moe_intermediate_size": ...}, "does not say moe_intermediate_size"),
        ("deepseek_v3", {"n_group": ..., "kv_lora_rank": ...}, "does not say kv_lora_rank, n_group"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'.*'noaux_tc'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'.*'sigmoid'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False with num_experts_per_tok=2"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 2}, "num_experts_per_tok=2 with n_group=2, topk_group=2.*=4"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"norm_topk_prob": ..., "num_experts_per_tok": 1}, r"norm_topk_prob \(absent, so True\) with"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn"}}, "yarn rope needs numbers above 0, but has factor=None"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1.0}}, "only one of mscale"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate=False"),
        ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 4}}, "rope_type='linear'.*default or yarn"),
    ],
)
def test_refuses_what_it_cannot_build_of_a_family(family, change, message):
    config = {key: value for key, value in hf_config(family, **change).items() if value is not ...}
    if config.get("num_experts", ...) is None:
        del config["num_experts"]
    with pytest.raises(ValueError, match=message):
        architecture.parse(config)


LAYOUT = {
    "llama": {"head_dim": 1, "num_key_value_heads": 2},
    "qwen3_moe": {},
    "deepseek_v3": {"num_key_value_heads": 8, "moe_intermediate_size": 12},
}


@pytest.mark.parametrize(
    ("family", "grid", "message"),
    [
        (
            "llama",
            Grid(tp=3),
            r"tensor_model_parallel_size=3 does not divide the model's 8 attention heads: choose a divisor",
        ),
        ("llama", Grid(tp=8), r"tensor_model_parallel_size=8 does not divide the model's 12 query, key and value rows"),
        ("llama", Grid(pp=4), r"pipeline_model_parallel_size=4 does not divide the model's 6 layers"),
        ("llama", Grid(pp=3, first_stage_layers=1), r"6 layers cannot be divided over 3 stages, of which first 1"),
        ("llama", Grid(dp=2, ep=2), r"expert-parallel size \(ep\)=2: a llama model has no experts"),
        ("qwen3_moe", Grid(dp=3, ep=3), r"expert-parallel size \(ep\)=3 does not divide the model's 4 experts"),
        (
            "qwen3_moe",
            Grid(dp=5, etp=5),
            r"expert tensor-parallel size \(etp\)=5 does not divide the model's 32 feed-forward columns of an expert",
        ),
        (
            "deepseek_v3",
            Grid(tp=8),
            r"tensor_model_parallel_size=8 does not divide the model's 12 shared experts' columns",
        ),
    ],
)
def test_refuses_a_layout_that_does_not_fit(family, grid, message):
    model = architecture.parse(hf_config(family, num_hidden_layers=6, num_attention_heads=8, **LAYOUT[family]))
    model.check_layout(Grid(tp=4, pp=3))
    with pytest.raises(ValueError, match=message):
        model.check_layout(grid)


def test_key_value_heads_may_be_fewer_than_ranks_that_they_divide():
    model = architecture.parse(hf_config("llama", num_attention_heads=12, num_key_value_heads=3))
    model.check_layout(Grid(tp=6))
    with pytest.raises(ValueError, match="tensor_model_parallel_size=4 does not divide the model's 3 key-value heads"):
        model.check_layout(Grid(tp=4))


TORCH_FREE = ("architecture", "layout", "grid", "identity")


@pytest.mark.parametrize("module", [*(f"pipeline.model.{name}" for name in TORCH_FREE), "pipeline.config.model_rules"])
def test_reading_a_model_needs_no_torch(module):
    """A configuration is checked where torch may take seconds to import, or not be there."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_family_is_one_entry():
    assert {family.name for family in FAMILIES.values()} == set(ARCHITECTURES)
    assert {family.name: name for name, family in FAMILIES.items()} == ARCHITECTURES


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "quantization_config": FP8,
}
V31 = DEEPSEEK | {
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096, **YARN},
    "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
}
KIMI_K2 = DEEPSEEK | {
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0,
    "rope_scaling": {
        **YARN,
        "type": "yarn",
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
        "beta_fast": 1.0,
    },
}
GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
}
NEXT = {  # Qwen3-Next-80B-A3B
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000,
}

QWEN3_5 = {  # Qwen3.5-35B-A3B
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27},
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "full_attention_interval": 4,
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
}


OSS = {  # gpt-oss-20b
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    # those published, without layers that predict ahead
    [(V31, 671.03e9), (KIMI_K2, 1026.4e9), (GLM, 352.8e9), (NEXT, 79.67e9), (QWEN3_5, 34.66e9), (OSS, 20.91e9)],
    ids=["DeepSeek-V3.1", "Kimi-K2", "GLM-4.5", "Qwen3-Next", "Qwen3.5", "gpt-oss"],
)
def test_models_in_full_size_are_read(config, parameters):
    model = architecture.parse(config)
    assert sum(math.prod(shape) for shape in tensor_shapes(model).values()) == pytest.approx(parameters, rel=1e-3)
    assert model.extra_layers == config.get("num_nextn_predict_layers", 0)
    model.check_layout(Grid(tp=8, ep=32, etp=1, dp=32))


@pytest.mark.parametrize(
    ("family", "said", "tokens"),
    [
        ("mistral", 100, 100),
        ("mistral", ..., 4096),
        ("mistral", None, None),
        ("mistral", 8192, None),
        ("mixtral", 100, 100),
        ("mixtral", ..., None),
    ],
)
def test_windows_of_all_layers_count_where_rows_may_be_longer(family, said, tokens):
    config = hf_config(family, max_position_embeddings=8192) | {"sliding_window": said}
    model = architecture.parse({key: value for key, value in config.items() if value is not ...})
    assert model.window == (Window((True, True), tokens) if tokens else None)
    assert model.native is (tokens is None)


def test_gpt_oss_has_a_window_in_every_other_layer_or_where_config_json_says():
    model = architecture.parse(OSS)
    assert model.window == Window((True, False) * 12, 128)
    assert model.rope_scaling.truncate is False
    assert not model.native
    named = ["full_attention", "sliding_attention"]
    assert architecture.parse(hf_config("gpt_oss", layer_types=named)).window == Window((False, True), 4)
    bare = architecture.parse(OSS | dict.fromkeys(("layer_types", "sliding_window", "num_key_value_heads", "head_dim")))
    assert bare.window == model.window
    assert architecture.parse(OSS | {"layer_types": ["full_attention"] * 24}).window is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\] is not supported"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"sliding_window": 0}, "sliding_window=0 is not a whole number"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"swiglu_limit": 5.0}, "swiglu_limit=5.0"),
        ({"rope_scaling": None}, "rope_scaling and rope_parameters are absent"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "MXFP4 codes"),
    ],
)
def test_what_gpt_oss_cannot_be_is_refused(changes, said):
    with pytest.raises(ModelError, match=said):
        architecture.parse(hf_config("gpt_oss", **changes))


def test_qwen3_next_has_the_layers_that_config_json_names():
    named = ["full_attention", "linear_attention"]
    assert architecture.parse(hf_config("qwen3_next", layer_types=named)).delta.layers == (False, True)
    assert architecture.parse(hf_config("qwen3_next")).delta.layers == (True, False)
    bare = {key: value for key, value in hf_config("qwen3_next").items() if not key.startswith(("linear_", "full_"))}
    model = architecture.parse(bare | {"num_hidden_layers": 4})
    assert model.delta == DeltaNet((True, True, True, False), 16, 32, 128, 128, 4)  # transformers' defaults
    assert not model.native


def test_a_model_that_also_sees_is_its_model_of_text():
    model = architecture.parse(QWEN3_5)
    assert (model.family.name, model.rotary_dim, model.tied, model.delta.per_key) == ("qwen3_5_moe_text", 64, False, 2)
    assert architecture.parse(QWEN3_5 | {"tie_word_embeddings": True}).tied
    assert architecture.parse(architecture.of_text(QWEN3_5)) == model
    with pytest.raises(ModelError, match=r"architectures \['Qwen3_5MoeForSequenceClassification'\] is not supported"):
        architecture.parse(QWEN3_5 | {"architectures": ["Qwen3_5MoeForSequenceClassification"]})
    with pytest.raises(ModelError, match="model_type 'qwen3_5_moe' is not supported"):
        architecture.parse({key: value for key, value in QWEN3_5.items() if key != "text_config"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\] is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads=6 is not a multiple of linear_num_key_heads=4"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_delta_nets_that_are_not_built_are_refused(changes, said):
    with pytest.raises(ModelError, match=said):
        architecture.parse(hf_config("qwen3_next", **changes))


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (Grid(dp=2, cp=2), "learner.context_parallel_size=2 is not supported for qwen3_next"),
        (Grid(tp=4), "learner.tensor_model_parallel_size=4 does not divide the model's 2 key heads of delta nets"),
    ],
)
def test_grids_that_delta_nets_cannot_have_are_refused(grid, said):
    with pytest.raises(ValueError, match=said):
        architecture.parse(hf_config("qwen3_next", linear_num_key_heads=2)).check_layout(grid)
