"""What the model's own config.json allows. The learner (``pipeline.model.architecture``) refuses the same models, but only
when its processes have started; a test holds the two together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.precision_rules import precision_model_problems
from pipeline.config.schema import LearnerConfig, RunConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_EXPERTS = {"qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}  # the key that counts them
_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_COUNTS_IN = {
    "qwen3_moe": ("num_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "deepseek_v3": (
        *("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
}
_FEATURES = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}  # the only values, also when absent
_DEEPSEEK_FEATURES = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_interleave": True}
_FP8_BLOCK = 128  # ``pipeline.model.fp8.BLOCK``, which would import torch here
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
    if "num_local_experts" in model:  # what transformers 5 may write instead
        model = {"num_experts": model["num_local_experts"], **model}
    refusals = [Problem("model.hf_path", path, problem, remedy) for problem, remedy in _refusals(model)]
    yield from refusals or [
        *_layout(config, model),
        *_lengths(config, model),
        *precision_model_problems(config, model),
        *_fp8_blocks(config, model),
    ]


def _refusals(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problem and remedy of everything in a model that is not built."""
    family = model.get("model_type")
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
    features = _FEATURES | (_DEEPSEEK_FEATURES if family == "deepseek_v3" else {})
    if family != "qwen2":
        features |= {"attention_bias": False}
    for key, value in features.items():
        if model.get(key, value) != value:
            yield f"config.json: {key}={model[key]!r} is not supported", f"use a model with {key}={value!r}"
    # Where Mistral's key is absent, transformers takes 4096.
    if family == "mistral" and (window := model.get("sliding_window", 4096)) is not None:
        yield f"config.json: sliding_window={window} is not supported", "use a model with sliding_window=null"
    counts = _COUNTS + _COUNTS_IN.get(family, ())
    lacking = [key for key in counts if not (isinstance(model.get(key), int) and model[key] > 0)]
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
    if family == "deepseek_v3":
        yield from _router_refusals(model)
    scaled = "yarn" if family == "deepseek_v3" else "llama3"
    yield from _rope_refusals(model.get("rope_parameters") or model.get("rope_scaling") or {}, scaled)


def _router_refusals(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """As ``_refusals``, for how DeepSeek-V3 chooses experts."""
    top_k, groups, top_groups = model["num_experts_per_tok"], model.get("n_group") or 0, model.get("topk_group") or 0
    if bool(model.get("norm_topk_prob", True)) != (top_k > 1):
        yield (
            f"config.json: norm_topk_prob={model.get('norm_topk_prob', True)} with num_experts_per_tok={top_k} is not supported",
            "use a model that normalises the scores of several experts, as DeepSeek-V3 does",
        )
    if groups > 1 and top_k != 2 * top_groups:
        yield (
            f"config.json: num_experts_per_tok={top_k} with n_group={groups}, topk_group={top_groups} is not supported",
            "use a model with num_experts_per_tok = 2 x topk_group, as DeepSeek-V3's",
        )


def _rope_refusals(rope: Mapping[str, Any], scaled: str) -> Iterator[tuple[str, str]]:
    """As ``_refusals``, for the rotary keys as transformers 4 or 5 spell them; ``scaled`` is the scaling that the family may have."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", scaled):
        yield f"config.json: rope_type={kind!r} is not supported", f"use a model with rope_type default or {scaled}"
        return
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
    elif "rlrt" in config.objective.token_shaping and 2 * length > positions:
        yield Problem(
            "objective.token_shaping",
            "rlrt",
            f"its teacher reads a worked example first: up to {2 * length} tokens, but the model has {positions} positions",
            f"make max_prompt_tokens + max_new_tokens at most {positions // 2}, or remove rlrt",
        )


def _layout(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the model can be cut as the configuration says, and computed by the engine it names."""
    learner, experts = config.learner, _EXPERTS.get(model["model_type"])
    yield from _divisions(config, model)
    yield from _stages(learner, model["num_hidden_layers"])
    if experts is None and learner.expert_model_parallel_size > 1:
        yield Problem(
            "learner.expert_model_parallel_size",
            learner.expert_model_parallel_size,
            f"a {model['model_type']} model has no experts",
            "set it to 1",
        )
    if experts and learner.tensor_model_parallel_size > 1 and not learner.sequence_parallel:
        yield Problem(
            "learner.sequence_parallel",
            False,
            f"the model has experts, which are trained under TP {learner.tensor_model_parallel_size} with it only",
            "set it to true",
        )
    if experts and config.rollout.engine == "native":
        yield Problem(
            "rollout.engine", "native", "the native engine computes dense models only", "set rollout.engine=sglang"
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
    learner, heads = config.learner, model["num_attention_heads"]
    groups, tp = model.get("num_key_value_heads") or heads, learner.tensor_model_parallel_size
    tensor = {"attention heads": heads, "feed-forward columns": model["intermediate_size"]}
    if model["model_type"] != "deepseek_v3" and tp > 1:
        width = model.get("head_dim") or model["hidden_size"] // heads
        if tp % groups:  # otherwise several ranks share a key-value head
            tensor["key-value heads"] = groups
        tensor["query, key and value rows"] = (heads + 2 * groups) * width
    checks = [
        ("learner.tensor_model_parallel_size", tp, tensor),
        ("rollout.tensor_parallel_size", config.rollout.tensor_parallel_size, {"attention heads": heads}),
    ]
    if experts := _EXPERTS.get(model["model_type"]):
        own = learner.expert_tensor_parallel_size
        key = "learner.expert_tensor_parallel_size" if own else "learner.tensor_model_parallel_size"
        columns = {"feed-forward columns of an expert": model["moe_intermediate_size"]}
        checks.append((key, own or tp, columns))
        checks.append(
            ("learner.expert_model_parallel_size", learner.expert_model_parallel_size, {"experts": model[experts]})
        )
    for key, size, dimensions in checks:
        for what, number in dimensions.items():
            if size >= 1 and number % size:
                divisors = ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)
                yield Problem(key, size, f"does not divide the model's {number} {what}", f"use one of {divisors}")
                break


def _stages(learner: LearnerConfig, layers: int) -> Iterator[Problem]:
    """Layers over pipeline stages, of which the first and the last may have their own number, and over chunks of each."""
    stages, chunks = learner.pipeline_model_parallel_size, learner.virtual_pipeline_model_parallel_size
    ends = {
        f"learner.num_layers_in_{which}_pipeline_stage": number
        for which in ("first", "last")
        if (number := getattr(learner, f"num_layers_in_{which}_pipeline_stage"))
    }
    if min(stages, chunks) < 1 or stages < 1 + bool(ends):
        return  # refused as values
    middle, left = stages - len(ends), layers - sum(ends.values())
    each = left // middle if middle > 0 else 0
    if each * middle != left or left < middle:
        named = ends or {"learner.pipeline_model_parallel_size": stages}
        rest = f"{left} of {layers} layers over {middle} stages" if ends else f"{layers} layers over {stages} stages"
        for key, value in list(named.items())[:1]:
            yield Problem(key, value, f"leaves {rest}, which cannot be even", "change it, or the number of stages")
    elif any(size % chunks for size in (each, *ends.values())):
        yield Problem(
            "learner.virtual_pipeline_model_parallel_size",
            chunks,
            f"does not divide the layers of every stage ({', '.join(str(n) for n in sorted({each, *ends.values()} - {0}))})",
            "use a divisor of them, or 1",
        )
