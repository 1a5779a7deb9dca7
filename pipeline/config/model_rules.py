"""Rules between the configuration and its model: parallel sizes, stages, lengths, FP8 blocks."""

from __future__ import annotations

import math
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.errors import Problem
from pipeline.config.lora_rules import lora_model_problems
from pipeline.config.precision_rules import precision_model_problems
from pipeline.config.schema import ENVIRONMENTS, LearnerConfig, RunConfig
from pipeline.model import architecture
from pipeline.model.architecture import Architecture
from pipeline.model.grid import KEYS, Grid, StagesError
from pipeline.model.reading import ModelError
from pipeline.model.rope import DynamicScaling, LongRope, Yarn
from pipeline.units import FP8_BLOCK


def model_problems(config: RunConfig, folder: Path) -> Iterator[Problem]:
    """Why the model in ``folder`` cannot be trained, or not in this layout or at these lengths.

    ``folder`` is ``model.hf_path`` resolved.
    """
    try:
        model = architecture.read(folder)
    except ModelError as error:
        refusals = error.refusals
        yield from (Problem("model.hf_path", config.model.hf_path, each.problem, each.remedy) for each in refusals)
        return
    yield from _layout(config, model)
    yield from _lengths(config, model)
    yield from _band(config, model)
    yield from precision_model_problems(config, model)
    yield from lora_model_problems(config, model)
    yield from _fp8_folder(config, folder)
    yield from _fp8_blocks(config, model)


def _band(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """Edges, now or later, that no policy of the model reaches; of a lower and an upper one the lower is named."""
    band, most = config.entropy.band, math.log(model.vocab)
    if config.entropy.controller == "none":
        return
    what = f"no policy over {model.vocab} tokens has more than ln {model.vocab} = {most:.3g} nats per token"
    remedy = "give a band below that, in nats per token: docs/band.md"
    for pair in (("low", "high"), ("end_low", "end_high")):
        edges = [(key, getattr(band, key)) for key in pair if getattr(band, key) >= most]
        yield from (Problem(f"entropy.band.{key}", value, what, remedy) for key, value in edges[:1])
    for point in band.points:
        if any(edge >= most for edge in point[1:]):
            yield Problem("entropy.band.points", point, what, remedy)


def _lengths(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    rollout, positions = config.rollout, model.max_positions
    if rollout.stop_token_ids and max(rollout.stop_token_ids) >= model.vocab:
        what = f"the model's vocabulary has {model.vocab} tokens, numbered from 0"
        yield Problem("rollout.stop_token_ids", rollout.stop_token_ids, what, "give ids of its tokenizer.json")
    if config.data.environment.name not in ENVIRONMENTS:
        return  # refused as a value
    length, free = config.longest_row, config.kept_free
    longrope = " for which longrope's short_factor holds" if isinstance(model.rope_scaling, LongRope) else ""
    if length + free > positions:
        yield Problem(
            "rollout.max_new_tokens",
            rollout.max_new_tokens,
            f"{config.room_words}, but the model has {positions} positions{longrope}",
            f"make them sum to at most {positions - free}",
        )
    elif "rlrt" in config.objective.token_shaping and 2 * length > positions:
        yield Problem(
            "objective.token_shaping",
            "rlrt",
            f"its teacher reads a worked example first: up to {2 * length} tokens, "
            f"but the model has {positions} positions",
            f"make max_prompt_tokens + max_new_tokens at most {positions // 2}, or remove rlrt",
        )


def _layout(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """Whether the model can be cut as the configuration says, and computed by the engine it names."""
    learner = config.learner
    yield from _divisions(config, model)
    yield from _stages(learner, model.layers)
    if model.moe is None and learner.expert_model_parallel_size > 1:
        yield Problem(
            "learner.expert_model_parallel_size",
            learner.expert_model_parallel_size,
            f"a {model.family.name} model has no experts",
            "set it to 1",
        )
    if model.moe and learner.tensor_model_parallel_size > 1 and not learner.sequence_parallel:
        yield Problem(
            "learner.sequence_parallel",
            False,
            f"the model has experts, which are trained under TP {learner.tensor_model_parallel_size} with it only",
            "set it to true",
        )
    expert_tp = learner.expert_tensor_parallel_size
    if model.family.biases and (expert_tp or learner.tensor_model_parallel_size) > 1:
        yield Problem(
            "learner.expert_tensor_parallel_size",
            expert_tp,
            f"experts of a {model.family.name} model have biases, which megatron-core adds on every rank that has a "
            "part of an expert",
            "set it to 1",
        )
    if model.delta and learner.context_parallel_size > 1:
        yield Problem(
            "learner.context_parallel_size",
            learner.context_parallel_size,
            f"not built for {model.family.name}: the state of a delta net passes from token to token through a row",
            "set it to 1",
        )
    yield from _sglang_ranks(config, model)
    yield from _sglang_experts(config, model)
    yield from _sglang_rotary(config, model)
    yield from _sglang_sights(config, model)
    yield from _routing(config, model)


def _routing(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """Whether there are routers to watch over, and routes that zeros cannot be (``pipeline.model.routing``)."""
    replay, remedy = config.learner.routing_replay, "set it to off"
    rate, z_loss = config.learner.moe_router_bias_update_rate, config.learner.moe_z_loss_coeff
    if rate and not (model.moe and model.moe.expert_bias):
        problem = f"a {model.family.name} model has no biases of experts to move"
        yield Problem("learner.moe_router_bias_update_rate", rate, problem, "set it to 0")
    if z_loss and model.moe is None:
        problem = f"a {model.family.name} model has no routers"
        yield Problem("learner.moe_z_loss_coeff", z_loss, problem, "set it to 0")
    if replay == "routes" and model.moe is None:
        yield Problem("learner.routing_replay", replay, f"a {model.family.name} model has no experts", remedy)
    elif replay == "routes" and model.moe and model.moe.top_k < 2:
        problem = "a token has one expert (config.json: num_experts_per_tok); replay needs two or more"
        yield Problem("learner.routing_replay", replay, problem, remedy)


def _sglang_ranks(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """Whether the ranks of a server can take slices of the model; by disk, they divide whole tensors themselves."""
    rollout, arguments = config.rollout, config.rollout.sglang.extra_args
    tp = rollout.tensor_parallel_size
    if rollout.engine != "sglang" or rollout.weight_transport == "disk" or tp < 1 or model.heads % tp:
        return  # the last two are refused by themselves
    try:
        ep = rollout.sglang.expert_groups
    except ArgumentError as error:
        yield Problem("rollout.sglang.extra_args", arguments, str(error), "give a whole number")
        return
    for size, problem in model.engine_limits(tp, ep):
        if size == "tp":
            remedy = "choose another, or set rollout.weight_transport=disk"
            yield Problem("rollout.tensor_parallel_size", tp, problem, remedy)
        else:
            yield Problem("rollout.sglang.extra_args", arguments, problem, "change --ep-size")


def _sglang_rotary(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """SGLang 0.5.21's ``layers/rotary_embedding`` differs from transformers, which the learner equals."""
    if config.rollout.engine != "sglang":
        return
    rope, remedy = model.rope_scaling, "set rollout.engine=native, or use a model without it"
    if isinstance(rope, DynamicScaling):
        problem = f"rope_type dynamic with factor={rope.factor:g}: SGLang enlarges the base for rows of every length"
        yield Problem("rollout.engine", "sglang", f"{problem}, the learner for none that is served", remedy)
    if isinstance(rope, (Yarn, LongRope)) and rope.explicit:
        problem = f"attention_factor={rope.attention_factor:g} of the model's rotary scaling is not read by SGLang"
        yield Problem("rollout.engine", "sglang", problem, remedy)


def _sglang_sights(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """Where an update's slices belong in SGLang 0.5.21's ``GptOssForCausalLM`` is not built; it refuses to start with
    ``torch_native`` attention. Its ``LlamaForCausalLM``, which serves Mistral too, and its Mixtral know no sliding
    window.
    """
    if config.rollout.engine != "sglang":
        return
    remedy = "set rollout.engine=native"
    if model.family.sinks:
        problem = f"live updates of {model.family.name} models are not built for SGLang"
        yield Problem("rollout.engine", "sglang", problem, remedy)
    elif model.window:
        problem = f"SGLang's {model.family.name} models see whole rows, not a sliding window of {model.window.tokens}"
        yield Problem("rollout.engine", "sglang", f"{problem} tokens", remedy)


def _sglang_experts(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """SGLang 0.5.21's ``Qwen3MoeDecoderLayer`` sets ``is_layer_sparse = True``, whatever config.json says."""
    if config.rollout.engine != "sglang" or model.family.name != "qwen3_moe" or model.moe is None:
        return
    dense = [layer for layer, experts in enumerate(model.moe.layers) if not experts]
    if dense:
        problem = (
            "SGLang builds experts in every layer of a qwen3_moe model; config.json (mlp_only_layers, "
            f"decoder_sparse_step) says that {len(dense)} of {model.layers} have none, the first is layer {dense[0]}"
        )
        remedy = "use a model that has experts in every layer: mlp_only_layers [] and decoder_sparse_step 1"
        yield Problem("rollout.engine", "sglang", problem, remedy)


def _fp8_folder(config: RunConfig, folder: Path) -> Iterator[Problem]:
    """A server reads ``quantization_config`` from the folder, and then takes FP8 alone."""
    rollout = config.rollout
    sent_otherwise = rollout.engine == "sglang" and rollout.weight_dtype != "fp8"
    if sent_otherwise and architecture.stored_in_fp8(architecture.read_config(folder)):
        problem = "the folder holds FP8 codes (quantization_config), so that SGLang has FP8 layers"
        remedy = "set it to fp8, or give the folder of the same model in 16 or 32 bits"
        yield Problem("rollout.weight_dtype", rollout.weight_dtype, problem, remedy)


def _fp8_blocks(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """What SGLang 0.5.21 asks of a model whose weights it takes in FP8, update after update."""
    rollout, family = config.rollout, model.family.name
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
    ranks = rollout.tensor_parallel_size
    parts = {
        "query": model.heads * model.head_dim // ranks,
        "key and value": max(1, model.kv_heads // ranks) * model.head_dim,
        "feed-forward": model.ffn // ranks,
    }
    for what, size in parts.items():
        if size % FP8_BLOCK:
            problem = (
                f"a rank's {size} {what} rows (tensor_parallel_size={ranks}) are not whole blocks of {FP8_BLOCK}, "
                "which SGLang asks for"
            )
            yield Problem("rollout.weight_dtype", "fp8", problem, f"{remedy}, or lower rollout.tensor_parallel_size")


def _divisions(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """Parallel sizes that must divide the model's dimensions."""
    learner, engine_tp = config.learner, config.rollout.tensor_parallel_size
    tp, etp, ep = (
        learner.tensor_model_parallel_size,
        learner.expert_tensor_parallel_size,
        learner.expert_model_parallel_size,
    )
    keys = {
        "tp": "learner.tensor_model_parallel_size",
        "etp": "learner.expert_tensor_parallel_size" if etp else "learner.tensor_model_parallel_size",
        "ep": "learner.expert_model_parallel_size",
    }
    if min(tp, ep, engine_tp) < 1 or etp < 0:
        return  # refused as values
    checks = [(keys[name], size, number, what) for name, size, number, what in model.divisions(tp, etp or tp, ep)]
    checks.append(("rollout.tensor_parallel_size", engine_tp, model.heads, "attention heads"))
    told: set[str] = set()  # one problem a key
    for key, size, number, what in checks:
        if number % size and key not in told:
            told.add(key)
            divisors = ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)
            yield Problem(key, size, f"does not divide the model's {number} {what}", f"use one of {divisors}")


def _stages(learner: LearnerConfig, layers: int) -> Iterator[Problem]:
    """Whether the layers can be divided over pipeline stages and over the chunks of each stage."""
    names = ("pp", "vpp", "first_stage_layers", "last_stage_layers")
    pp, vpp, first, last = (getattr(learner, KEYS[name]) for name in names)
    if min(pp, vpp) < 1 or pp < 1 + bool(first or last):
        return  # refused as values
    try:
        Grid(pp=pp, vpp=vpp, first_stage_layers=first or None, last_stage_layers=last or None).chunks(layers)
    except StagesError as error:
        key = KEYS[error.size]
        yield Problem(f"learner.{key}", getattr(learner, key), error.problem, error.remedy)
