"""What the model's own config.json allows. The learner (``megatron_ext.architecture``) refuses the same models, but only
when its processes have started; a test holds the two together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_CONVERTED_ONLY = ("qwen3_moe", "deepseek_v3")  # weights are mapped, training is not built
_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_FEATURES = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}  # the only values, also when absent
_FP8_BLOCK = 128  # ``pipeline.fp8.BLOCK``, which would import torch here
# The rest of Llama 3's rotary scaling is fixed in megatron-core's RotaryEmbedding.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def model_problems(config: RunConfig, folder: Path) -> Iterator[Problem]:
    """Why ``folder``, which is ``model.hf_path`` resolved, cannot be trained, or not in this layout or at these lengths."""
    path = config.model.hf_path
    if not (folder / "config.json").is_file():
        problem = "this folder has no config.json" if folder.is_dir() else "no such folder"
        remedy = "give a Hugging Face model folder (download or convert the model first)"
        yield Problem("model.hf_path", path, problem, remedy)
        return
    try:
        model = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        yield Problem("model.hf_path", path, f"config.json is not JSON: {error}", "restore the model folder")
        return
    if not isinstance(model, dict):
        yield Problem("model.hf_path", path, "config.json is not a JSON object", "restore the model folder")
        return
    refusals = [Problem("model.hf_path", path, problem, remedy) for problem, remedy in _refusals(model)]
    yield from refusals or [*_divisions(config, model), *_lengths(config, model), *_fp8_blocks(config, model)]


def _refusals(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problem and remedy of everything in a model that is not built."""
    family = model.get("model_type")
    if family in _CONVERTED_ONLY:
        yield (
            f"model_type {family!r} cannot be trained yet: this version converts and plans mixtures of experts, no more",
            f"train a model of one of the families {', '.join(ARCHITECTURES)}",
        )
        return
    if family not in ARCHITECTURES:
        yield (
            f"model_type {family!r} is not supported",
            f"use a model of one of the families {', '.join(ARCHITECTURES)}",
        )
        return
    named = (model.get("architectures") or [None])[0]
    if named != ARCHITECTURES[family]:
        yield (
            f"config.json: architectures {named!r} is not supported for model_type {family!r}",
            f"use a causal language model: architectures [{ARCHITECTURES[family]!r}]",
        )
        return
    features = _FEATURES if family == "qwen2" else _FEATURES | {"attention_bias": False}
    for key, value in features.items():
        if model.get(key, value) != value:
            yield f"config.json: {key}={model[key]!r} is not supported", f"use a model with {key}={value!r}"
    # Where Mistral's key is absent, transformers takes 4096.
    if family == "mistral" and (window := model.get("sliding_window", 4096)) is not None:
        yield f"config.json: sliding_window={window} is not supported", "use a model with sliding_window=null"
    lacking = [key for key in _COUNTS if not (isinstance(model.get(key), int) and model[key] > 0)]
    if not isinstance(model.get("rms_norm_eps"), (int, float)):
        lacking.append("rms_norm_eps")
    if lacking:
        yield f"config.json does not say {', '.join(lacking)}", "restore the model folder"
        return
    heads = model["num_attention_heads"]
    groups = model.get("num_key_value_heads") or heads
    if heads % groups:
        yield (
            f"config.json: num_key_value_heads={groups} does not divide num_attention_heads={heads}",
            "restore the model folder",
        )
    yield from _rope_refusals(model.get("rope_parameters") or model.get("rope_scaling") or {})


def _rope_refusals(rope: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """As ``_refusals``, for the rotary keys as transformers 4 or 5 spell them."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        yield f"config.json: rope_type={kind!r} is not supported", "use a model with rope_type default or llama3"
    if kind != "llama3":
        return
    if not isinstance(rope.get("factor"), (int, float)):
        yield "config.json: llama3 rope without a factor", "restore the model folder"
    for key, value in _LLAMA3_ROPE.items():
        if rope.get(key, value) != value:
            yield f"config.json: llama3 rope with {key}={rope[key]} is not supported", f"use a model with {key}={value}"


def _lengths(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    rollout, positions = config.rollout, model["max_position_embeddings"]
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    if length > positions:
        yield Problem(
            "rollout.max_new_tokens",
            rollout.max_new_tokens,
            f"max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens {rollout.max_new_tokens} = "
            f"{length} tokens, but the model has {positions} positions",
            f"make them sum to at most {positions}",
        )


def _fp8_blocks(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    """What SGLang 0.5.21 asks of a model whose weights it takes in FP8, update after update."""
    rollout, family = config.rollout, model["model_type"]
    if rollout.weight_dtype != "fp8" or rollout.engine != "sglang":
        return
    remedy = "set rollout.weight_dtype=auto, or rollout.engine=native"
    if family in ("llama", "mistral"):
        problem = (
            f"SGLang cannot update FP8 weights of model_type {family!r}: it drops the scales of blocks, and the layers "
            "with one scale per tensor are transposed once loaded"
        )
        yield Problem("rollout.weight_dtype", "fp8", problem, remedy)
        return
    heads, ranks = model["num_attention_heads"], rollout.tensor_parallel_size
    groups, width = model.get("num_key_value_heads") or heads, model.get("head_dim") or model["hidden_size"] // heads
    parts = {
        "query": heads * width // ranks,
        "key and value": max(1, groups // ranks) * width,
        "feed-forward": model["intermediate_size"] // ranks,
    }
    for what, size in parts.items():
        if size % _FP8_BLOCK:
            problem = f"a rank's {size} {what} rows (tensor_parallel_size={ranks}) are not whole blocks of {_FP8_BLOCK}, which SGLang asks for"
            yield Problem("rollout.weight_dtype", "fp8", problem, f"{remedy}, or lower rollout.tensor_parallel_size")


def _divisions(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    """Parallel sizes that must divide the model's dimensions."""
    heads, layers = model["num_attention_heads"], model["num_hidden_layers"]
    tensor = {
        "attention heads": heads,
        "key-value heads": model.get("num_key_value_heads") or heads,
        "feed-forward columns": model["intermediate_size"],
    }
    learner = config.learner
    checks = (
        ("learner.tensor_model_parallel_size", learner.tensor_model_parallel_size, tensor),
        ("learner.pipeline_model_parallel_size", learner.pipeline_model_parallel_size, {"layers": layers}),
        ("rollout.tensor_parallel_size", config.rollout.tensor_parallel_size, {"attention heads": heads}),
    )
    for key, size, dimensions in checks:
        for what, number in dimensions.items():
            if size >= 1 and number % size:
                divisors = ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)
                yield Problem(key, size, f"does not divide the model's {number} {what}", f"use one of {divisors}")
                break
