"""The rules a configuration must keep beyond keys and types: what values and combinations can work at all.

Permitted words and ranges are tables (the documentation prints them); everything that relates several keys or the disk is
one small function each, listed in ``RULES``; what the model allows is in ``model_rules``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config.errors import Problem
from pipeline.config.keys import leaf_keys
from pipeline.config.model_rules import model_problems
from pipeline.config.objective_rules import ADVANTAGES, LOSSES, SHAPINGS, objective_problems
from pipeline.config.precision_rules import precision_problems
from pipeline.config.schema import LearnerConfig, RunConfig

DETERMINISTIC = "--enable-deterministic-inference"
TEMPERATURE_ACTUATORS = ("resample", "reweight", "fc", "dcpo")
SINKS = ("tensorboard", "wandb", "mlflow", "prometheus")
# What each published law was made for; ``pi`` drives any actuator.
CONTROLLER_ACTUATORS = {
    "scope": TEMPERATURE_ACTUATORS,
    "bang_bang": TEMPERATURE_ACTUATORS,
    "skywork": ("entropy_bonus",),
    "aent": ("entropy_bonus",),
    "entropic": ("high_prob",),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "runtime": ("ray", "inline"),
    "model.dtype": ("fp32", "bf16"),
    "learner.recompute_granularity": ("none", "selective", "full"),
    "learner.recompute_method": ("uniform", "block"),
    "learner.transformer_impl": ("auto", "local", "transformer_engine"),
    "learner.log_prob_kernel": ("auto", "torch", "fused", "triton"),
    "learner.precision.fp8": ("none", "e4m3", "hybrid"),
    "learner.precision.fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "learner.precision.fp8_amax_compute_algo": ("max", "most_recent"),
    "learner.optimizer.lr_schedule": ("constant", "linear", "cosine"),
    "rollout.engine": ("native", "sglang"),
    "rollout.placement": ("disaggregated", "colocated"),
    "rollout.weight_transport": ("tensor", "distributed", "disk"),
    "rollout.weight_dtype": ("auto", "fp8"),
    "rollout.sglang.dtype": ("auto", "float32", "bfloat16"),
    "data.source.kind": ("countdown", "reasoning_gym", "jsonl"),
    "data.verifier": ("auto", "exact", "math", "reasoning_gym", "countdown", "choice"),
    "objective.advantage": ADVANTAGES,
    "objective.loss": LOSSES,
    "objective.token_shaping": SHAPINGS,
    "objective.correction.kind": ("none", "tis", "mis"),
    "objective.correction.level": ("token", "sequence"),
    "objective.aggregation": ("token_mean", "sequence_mean", "dr_grpo"),
    "entropy.controller": ("pi", *CONTROLLER_ACTUATORS, "constant", "none"),
    "entropy.actuator": (*TEMPERATURE_ACTUATORS, "tok", "entropy_bonus", "high_prob", "clip_cov"),
    "entropy.positive_mean": ("positives", "samples", "main"),
    "entropy.band.schedule": ("constant", "linear", "cosine", "piecewise"),
    "monitoring.wandb.mode": ("online", "offline"),
    "monitoring.stall.action": ("report", "restart"),
}


@dataclass(frozen=True)
class Range:
    """Permitted numbers: from ``low`` (excluded when ``open_low``) to ``high`` (excluded when ``open_high``)."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and abs(value) < math.inf

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


_ANY = Range(-math.inf)
_POSITIVE = Range(0, open_low=True)
_NOT_NEGATIVE = Range(0)
_COUNT = Range(1)
_SHARE = Range(0, 1, open_high=True)
_FRACTION = Range(0, 1, open_low=True)
_SEED = Range(0, 2**63 - 1)

RANGES: dict[str, Range] = {
    "seed": _SEED,
    "steps": _COUNT,
    "learner.tensor_model_parallel_size": _COUNT,
    "learner.pipeline_model_parallel_size": _COUNT,
    "learner.data_parallel_size": _COUNT,
    "learner.context_parallel_size": _COUNT,
    "learner.expert_model_parallel_size": _COUNT,
    "learner.expert_tensor_parallel_size": _NOT_NEGATIVE,
    "learner.virtual_pipeline_model_parallel_size": _COUNT,
    "learner.num_layers_in_first_pipeline_stage": _NOT_NEGATIVE,
    "learner.num_layers_in_last_pipeline_stage": _NOT_NEGATIVE,
    "learner.recompute_num_layers": _COUNT,
    "learner.precision.fp8_margin": _NOT_NEGATIVE,
    "learner.precision.fp8_amax_history_len": _COUNT,
    "learner.precision.num_layers_at_start_in_bf16": _NOT_NEGATIVE,
    "learner.precision.num_layers_at_end_in_bf16": _NOT_NEGATIVE,
    "learner.micro_batch_size": _COUNT,
    "learner.max_tokens_per_micro_batch": _NOT_NEGATIVE,
    "learner.updates_per_step": _COUNT,
    "learner.bucket_mib": _COUNT,
    "learner.optimizer.lr": _POSITIVE,
    "learner.optimizer.min_lr": _NOT_NEGATIVE,
    "learner.optimizer.warmup_steps": _NOT_NEGATIVE,
    "learner.optimizer.eps": _POSITIVE,
    "learner.optimizer.weight_decay": _NOT_NEGATIVE,
    "learner.optimizer.clip_grad": _NOT_NEGATIVE,
    "rollout.engines": _COUNT,
    "rollout.tensor_parallel_size": _COUNT,
    "rollout.prompts_per_step": _COUNT,
    "rollout.samples_per_prompt": Range(2),
    "rollout.sampling_rounds": _COUNT,
    "rollout.cuts.share": Range(0, 1),
    "rollout.cuts.top": _COUNT,
    "rollout.cuts.floor": Range(0, 1, open_high=True),
    "rollout.cuts.warmup_tokens": _NOT_NEGATIVE,
    "rollout.staleness": Range(0, 16),
    "rollout.max_prompt_tokens": _COUNT,
    "rollout.max_new_tokens": _COUNT,
    "rollout.weight_sync_timeout_s": _POSITIVE,
    "rollout.sglang.mem_fraction_static": Range(0, 1, open_low=True, open_high=True),
    "rollout.sglang.max_total_tokens": _NOT_NEGATIVE,
    "rollout.sglang.startup_timeout_s": _POSITIVE,
    "rollout.sglang.request_timeout_s": _POSITIVE,
    "data.source.size": _COUNT,
    "data.source.seed": _SEED,
    "data.held_out": _SHARE,
    "data.verifier_timeout_s": _POSITIVE,
    "data.verifier_workers": _COUNT,
    "objective.clip_low": Range(0, 1, open_low=True),
    "objective.clip_high": _POSITIVE,
    "objective.dual_clip": _NOT_NEGATIVE,
    "objective.kl_coef": _NOT_NEGATIVE,
    "objective.correction.high": Range(1),
    "objective.correction.low": Range(0, 1),
    "objective.overlong.buffer": _NOT_NEGATIVE,
    "objective.overlong.penalty": _POSITIVE,
    "objective.pass_at_k.samples": _COUNT,
    "objective.pass_at_k.share": _FRACTION,
    "objective.ce_gppo.beta_low": _NOT_NEGATIVE,
    "objective.ce_gppo.beta_high": _NOT_NEGATIVE,
    "objective.kl_cov.fraction": _FRACTION,
    "objective.kl_cov.coef": _POSITIVE,
    "objective.htpo.difficulty": Range(0, 1),
    "objective.htpo.high_entropy": _FRACTION,
    "objective.htpo.skip_low": _FRACTION,
    "objective.htpo.skip_high": _FRACTION,
    "objective.clip_cov.fraction": _FRACTION,
    "objective.clip_cov.low": _NOT_NEGATIVE,
    "objective.clip_cov.high": _POSITIVE,
    "objective.entropy_adv.scale": _POSITIVE,
    "objective.entropy_adv.divisor": Range(1, open_low=True),
    "objective.high_entropy.fraction": _FRACTION,
    "objective.stare.target": _POSITIVE,
    "objective.stare.fraction": _FRACTION,
    "objective.stare.positive": Range(1),
    "objective.stare.negative": Range(0, 1),
    "objective.rlrt.mix": _FRACTION,
    "objective.rlrt.clip": _FRACTION,
    "entropy.alpha": _NOT_NEGATIVE,
    "entropy.repeated_prompts": _NOT_NEGATIVE,
    "entropy.band.low": _POSITIVE,
    "entropy.band.high": _POSITIVE,
    "entropy.band.end_low": _NOT_NEGATIVE,
    "entropy.band.end_high": _NOT_NEGATIVE,
    "entropy.band.hold_steps": _NOT_NEGATIVE,
    "entropy.band.schedule_steps": _NOT_NEGATIVE,
    "entropy.command": _NOT_NEGATIVE,
    "entropy.command_min": Range(-1),
    "entropy.command_max": _NOT_NEGATIVE,
    "entropy.auxiliary_prompts": _COUNT,
    "entropy.auxiliary_samples": _COUNT,
    "entropy.auxiliary_max_prompts": _NOT_NEGATIVE,
    "entropy.pi.kp": _NOT_NEGATIVE,
    "entropy.pi.ki": _NOT_NEGATIVE,
    "entropy.pi.ema": _SHARE,
    "entropy.pi.slew": _NOT_NEGATIVE,
    "entropy.pi.setpoint_ramp": _NOT_NEGATIVE,
    "entropy.pi.dead_band": _NOT_NEGATIVE,
    "entropy.pi.saturation_steps": _COUNT,
    "entropy.skywork.step": _POSITIVE,
    "entropy.skywork.upper": _POSITIVE,
    "entropy.aent.rate": _POSITIVE,
    "entropy.aent.least": _NOT_NEGATIVE,
    "entropy.aent.most": _POSITIVE,
    "entropy.entropic.kp": _NOT_NEGATIVE,
    "entropy.entropic.ki": _NOT_NEGATIVE,
    "evaluation.every": _NOT_NEGATIVE,
    "evaluation.prompts": _COUNT,
    "evaluation.samples": _COUNT,
    "evaluation.temperature": _POSITIVE,
    "checkpoint.every": _NOT_NEGATIVE,
    "checkpoint.keep_last": _COUNT,
    "monitoring.samples_per_step": _NOT_NEGATIVE,
    "monitoring.prometheus.port": Range(1, 65535),
    "monitoring.stall.factor": _NOT_NEGATIVE,
    "monitoring.stall.min_seconds": _POSITIVE,
}


def problems_of(config: RunConfig, model_folder: Path, *, files_here: bool = True) -> list[Problem]:
    """Every rule that ``config`` breaks. ``model_folder`` is ``model.hf_path``, resolved; ``files_here``: whether data are on this machine.

    Rules on combinations speak only when each value is possible by itself.
    """
    problems = [problem for rule in (_words, _numbers) for problem in rule(config)]
    if not problems:
        problems = [problem for rule in RULES for problem in rule(config)]
        problems += _data_file(config) if files_here else ()
    return problems + list(model_problems(config, model_folder))


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _words(config: RunConfig) -> Iterator[Problem]:
    for key, choices in CHOICES.items():
        given = _value(config, key)
        for value in given if isinstance(given, list) else [given]:
            if value in choices or (key == "data.verifier" and ":" in value):  # _verifier judges its form
                continue
            nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
            remedy = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(choices)}"
            yield Problem(key, value, f"not one of {', '.join(choices)}", remedy)


def _numbers(config: RunConfig) -> Iterator[Problem]:
    for key, leaf in leaf_keys().items():
        value, permitted = _value(config, key), RANGES.get(key, _ANY)
        if leaf.type in (int, float) and value not in permitted:
            problem = "out of range" if abs(value) < math.inf else "not a finite number"
            yield Problem(key, value, problem, f"give a number {permitted}")


def _name(config: RunConfig) -> Iterator[Problem]:
    if not re.fullmatch(r"[\w.+-][\w.+ -]*", config.name):
        yield Problem(
            "name", config.name, "cannot be part of a folder name", "use letters, digits, '_', '-', '.' and '+'"
        )


def _batch(config: RunConfig) -> Iterator[Problem]:
    rollout, learner = config.rollout, config.learner
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    product = (
        f"a step has {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples "
        f"(rollout.prompts_per_step x rollout.samples_per_prompt) = {rows} rows"
    )
    if rows % learner.updates_per_step:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0 and n <= 2 * learner.updates_per_step]
        yield Problem(
            "learner.updates_per_step",
            learner.updates_per_step,
            f"{product}, which {learner.updates_per_step} updates do not divide",
            f"choose a divisor of {rows}, e.g. {divisors[-1]}, or change the number of prompts or samples",
        )
    elif rows // learner.updates_per_step < learner.data_parallel_size:
        per_update = rows // learner.updates_per_step
        yield Problem(
            "learner.data_parallel_size",
            learner.data_parallel_size,
            f"{product}, so {per_update} per update: fewer than the data-parallel ranks that share them",
            f"use at most {per_update} ranks, fewer updates_per_step, or more prompts or samples",
        )
    if rollout.engines > rollout.prompts_per_step:
        yield Problem(
            "rollout.engines",
            rollout.engines,
            f"more engines than prompts per step ({rollout.prompts_per_step}): some would never work",
            "use at most rollout.prompts_per_step engines",
        )


def _processes(config: RunConfig) -> Iterator[Problem]:
    learner = config.learner
    tensor, context, pipeline, data = (
        learner.tensor_model_parallel_size,
        learner.context_parallel_size,
        learner.pipeline_model_parallel_size,
        learner.data_parallel_size,
    )
    processes = learner.world_size
    if config.runtime == "inline" and processes > 1:
        yield Problem(
            "runtime",
            "inline",
            f"one process cannot hold TP {tensor} x CP {context} x PP {pipeline} x DP {data} = {processes} learner processes",
            "set runtime=ray, or the learner.*_parallel_size to 1",
        )
    if config.rollout.engine == "native" and config.rollout.tensor_parallel_size > 1:
        yield Problem(
            "rollout.tensor_parallel_size",
            config.rollout.tensor_parallel_size,
            "the native engine has no tensor parallelism",
            "set it to 1, or rollout.engine=sglang",
        )
    if config.rollout.engine == "native" and config.rollout.weight_transport != "tensor":
        yield Problem(
            "rollout.weight_transport",
            config.rollout.weight_transport,
            "the native engine takes weights in memory, there is no server to carry them to",
            "remove it, or set rollout.engine=sglang",
        )


def _colocated(config: RunConfig) -> Iterator[Problem]:
    rollout, learner = config.rollout, config.learner
    if rollout.placement == "disaggregated":
        return
    if rollout.engine == "native":
        yield Problem(
            "rollout.placement",
            rollout.placement,
            "the native engine computes on the CPU and has no GPU memory to leave",
            "remove it, or set rollout.engine=sglang",
        )
    if rollout.staleness:
        yield Problem(
            "rollout.staleness",
            rollout.staleness,
            "samples are drawn ahead to keep engines busy while the learner trains, which colocated ones cannot be",
            "set it to 0, or set rollout.placement=disaggregated",
        )
    needed, ranks = rollout.engines * rollout.tensor_parallel_size, learner.world_size
    if needed > ranks:
        yield Problem(
            "rollout.engines",
            rollout.engines,
            f"{rollout.engines} engines of TP {rollout.tensor_parallel_size} need {needed} GPUs, the learner they are colocated with has {ranks}",
            "lower rollout.engines or rollout.tensor_parallel_size, or set rollout.placement=disaggregated",
        )


def _token_budget(config: RunConfig) -> Iterator[Problem]:
    rollout, learner = config.rollout, config.learner
    budget, length = learner.max_tokens_per_micro_batch, rollout.max_prompt_tokens + rollout.max_new_tokens
    if 0 < budget < length:
        yield Problem(
            "learner.max_tokens_per_micro_batch",
            budget,
            f"cannot hold one row: max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens {rollout.max_new_tokens} = "
            f"{length} tokens",
            f"use at least {length}, better several times as many, or 0 (micro_batch_size rows)",
        )
    if learner.packing and not budget:
        yield Problem(
            "learner.packing",
            True,
            "micro-batches of so many rows would be packed sequences of any length",
            f"set learner.max_tokens_per_micro_batch to {length} or more, or packing=false",
        )
    if learner.packing and learner.context_parallel_size > 1:
        yield Problem(
            "learner.packing",
            True,
            f"context parallelism (learner.context_parallel_size = {learner.context_parallel_size}) cuts grids only",
            "set packing=false (micro-batches by tokens have little padding), or context_parallel_size=1",
        )


def _sequence_parallel(config: RunConfig) -> Iterator[Problem]:
    if config.learner.sequence_parallel and config.learner.tensor_model_parallel_size == 1:
        yield Problem(
            "learner.sequence_parallel",
            True,
            "there are no tensor-parallel ranks to divide the sequence over",
            "set learner.tensor_model_parallel_size above 1, or it to false",
        )


def _pipeline(config: RunConfig) -> Iterator[Problem]:
    learner = config.learner
    stages, chunks = learner.pipeline_model_parallel_size, learner.virtual_pipeline_model_parallel_size
    first, last = learner.num_layers_in_first_pipeline_stage, learner.num_layers_in_last_pipeline_stage
    needs_stages = {
        "learner.virtual_pipeline_model_parallel_size": chunks if chunks > 1 else 0,
        "learner.num_layers_in_first_pipeline_stage": first,
        "learner.num_layers_in_last_pipeline_stage": last,
    }
    for key, value in needs_stages.items():
        if value and stages == 1:
            yield Problem(
                key,
                value,
                "the pipeline has one stage",
                "set learner.pipeline_model_parallel_size above 1, or remove it",
            )
    if stages == 2 and chunks > 1 and first and last:
        yield Problem(
            "learner.virtual_pipeline_model_parallel_size",
            chunks,
            "megatron-core does not interleave two stages that both have their own number of layers",
            "set one of learner.num_layers_in_first_pipeline_stage and learner.num_layers_in_last_pipeline_stage to 0",
        )


def _experts(config: RunConfig) -> Iterator[Problem]:
    learner = config.learner
    tensor = learner.expert_tensor_parallel_size or learner.tensor_model_parallel_size
    groups = learner.expert_model_parallel_size * tensor
    ranks = learner.tensor_model_parallel_size * learner.context_parallel_size * learner.data_parallel_size
    if ranks % groups:
        yield Problem(
            "learner.expert_model_parallel_size",
            learner.expert_model_parallel_size,
            f"EP {learner.expert_model_parallel_size} x expert-TP {tensor} does not divide the {ranks} ranks of a stage "
            f"(TP {learner.tensor_model_parallel_size} x CP {learner.context_parallel_size} x DP {learner.data_parallel_size})",
            "lower it or learner.expert_tensor_parallel_size, or raise learner.data_parallel_size",
        )


def _overlap(config: RunConfig) -> Iterator[Problem]:
    optimizer = config.learner.optimizer
    if optimizer.overlap_param_gather and not (optimizer.distributed and optimizer.overlap_grad_reduce):
        yield Problem(
            "learner.optimizer.overlap_param_gather",
            True,
            "only the distributed optimizer gathers parameters, and beside overlap_grad_reduce only",
            "set learner.optimizer.distributed and learner.optimizer.overlap_grad_reduce to true, or it to false",
        )


def _recompute(config: RunConfig) -> Iterator[Problem]:
    learner = config.learner
    for key in ("recompute_method", "recompute_num_layers"):
        value = getattr(learner, key)
        if learner.recompute_granularity != "full" and value != getattr(LearnerConfig(), key):
            yield Problem(
                f"learner.{key}",
                value,
                f"has no effect with learner.recompute_granularity={learner.recompute_granularity}",
                "remove it, or set learner.recompute_granularity=full",
            )


def _kv_cache(config: RunConfig) -> Iterator[Problem]:
    rollout, tokens = config.rollout, config.rollout.sglang.max_total_tokens
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    if rollout.engine == "sglang" and 0 < tokens < length:
        yield Problem(
            "rollout.sglang.max_total_tokens",
            tokens,
            f"the KV cache cannot hold one sample: max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens "
            f"{rollout.max_new_tokens} = {length} tokens",
            f"use at least {length}, better several times as many, or 0 (SGLang decides)",
        )


def _fp8_rollouts(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.weight_dtype == "fp8" and rollout.engine == "sglang" and rollout.sglang.dtype == "float32":
        yield Problem(
            "rollout.sglang.dtype",
            "float32",
            "SGLang's FP8 layers (rollout.weight_dtype=fp8) have 16-bit activations",
            "use auto or bfloat16",
        )


def _optimizer(config: RunConfig) -> Iterator[Problem]:
    optimizer = config.learner.optimizer
    if len(optimizer.betas) != 2 or not all(beta in _SHARE for beta in optimizer.betas):
        yield Problem(
            "learner.optimizer.betas",
            optimizer.betas,
            "not two numbers in [0, 1)",
            "give [beta1, beta2], e.g. [0.9, 0.95]",
        )
    if optimizer.min_lr > optimizer.lr:
        yield Problem(
            "learner.optimizer.min_lr",
            optimizer.min_lr,
            f"above learner.optimizer.lr ({optimizer.lr:g})",
            "lower min_lr or raise lr",
        )
    if optimizer.lr_schedule != "constant" and optimizer.warmup_steps >= config.steps:
        yield Problem(
            "learner.optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"leaves none of the {config.steps} steps for the {optimizer.lr_schedule} schedule",
            "use fewer than steps, or learner.optimizer.lr_schedule=constant",
        )


def _data(config: RunConfig) -> Iterator[Problem]:
    data, source = config.data, config.data.source
    if source.kind == "countdown" and not re.fullmatch(r"(pm|cd)[2-5]", source.task):
        remedy = "use pm2 to pm5 (+ and -) or cd2 to cd5 (+, - and *)"
        yield Problem("data.source.task", source.task, "not a countdown task", remedy)
    if source.kind == "reasoning_gym" and not source.task.isidentifier():
        yield Problem(
            "data.source.task", source.task, "not a reasoning-gym dataset name", "name a dataset, e.g. chain_sum"
        )
    if source.kind == "reasoning_gym" and source.size < config.rollout.prompts_per_step:
        yield Problem(
            "data.source.size",
            source.size,
            f"fewer than a step takes (rollout.prompts_per_step = {config.rollout.prompts_per_step})",
            "raise it: a step never holds a prompt twice",
        )
    if source.kind != "reasoning_gym" and source.params:
        yield Problem(
            "data.source.params",
            source.params,
            f"has no effect with data.source.kind={source.kind}",
            "remove it, or set data.source.kind=reasoning_gym",
        )
    if data.system_prompt and not data.chat_template:
        yield Problem(
            "data.system_prompt",
            data.system_prompt,
            "has no effect without the chat template",
            "set data.chat_template=true or remove it",
        )


def _data_file(config: RunConfig) -> Iterator[Problem]:
    source = config.data.source
    if source.kind == "jsonl" and not Path(source.path).is_file():
        yield Problem("data.source.path", source.path, "no such file", "give the path of a JSONL file of prompts")


def _verifier(config: RunConfig) -> Iterator[Problem]:
    module, colon, function = config.data.verifier.partition(":")
    if colon and not all(part.isidentifier() for part in (*module.split("."), function)):
        yield Problem(
            "data.verifier",
            config.data.verifier,
            "not a verifier's name, nor module:function",
            "name your own as module:function, e.g. my_package.rewards:score, with the module on PYTHONPATH",
        )


def _examples(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.examples and not data.chat_template:
        yield Problem(
            "data.examples",
            data.examples,
            "has no effect without the chat template",
            "set data.chat_template=true or remove it",
        )
    for example in data.examples:
        if len(example) != 2:
            yield Problem("data.examples", example, "not a pair", "write [[question, answer], ...]")


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluation = config.evaluation
    if not evaluation.k or min(evaluation.k) < 1 or max(evaluation.k) > evaluation.samples:
        yield Problem(
            "evaluation.k",
            evaluation.k,
            f"pass@k from {evaluation.samples} samples needs every k between 1 and {evaluation.samples}",
            "raise evaluation.samples or remove the k outside",
        )
    if (evaluation.every or evaluation.at_start or evaluation.at_end) and config.data.held_out == 0:
        yield Problem(
            "data.held_out",
            0.0,
            "evaluation is on but no prompt is held out",
            "set data.held_out, e.g. 0.1, or evaluation.every=0, at_start=false and at_end=false",
        )


def _dual_clip(config: RunConfig) -> Iterator[Problem]:
    if 0 < config.objective.dual_clip <= 1:
        yield Problem(
            "objective.dual_clip",
            config.objective.dual_clip,
            "a bound of the ratio at or below 1 would clip every negative sample",
            "use 0 (off) or a number above 1, e.g. 10",
        )


def _correction(config: RunConfig) -> Iterator[Problem]:
    correction = config.objective.correction
    if correction.kind == "tis" and correction.low > 0:
        yield Problem(
            "objective.correction.low",
            correction.low,
            "has no effect with objective.correction.kind=tis, which truncates large weights only",
            "set it to 0, or objective.correction.kind=mis",
        )


def _band(config: RunConfig) -> Iterator[Problem]:
    band = config.entropy.band
    edges = "an edge at or below zero, or low not below high"
    if band.low >= band.high:
        yield Problem(
            "entropy.band.low", band.low, f"not below entropy.band.high ({band.high:g})", "swap or widen them"
        )
    moving = band.schedule in ("linear", "cosine")
    if moving and not 0 < band.end_low < band.end_high:
        yield Problem(
            "entropy.band.end_low",
            band.end_low,
            f"the {band.schedule} schedule ends at [{band.end_low:g}, {band.end_high:g}]: {edges}",
            "set end_low and end_high with 0 < end_low < end_high",
        )
    if moving and band.hold_steps >= config.steps:
        yield Problem(
            "entropy.band.hold_steps",
            band.hold_steps,
            f"the band would never move within steps={config.steps}",
            "hold it for fewer steps, or train longer",
        )
    if not moving and (band.end_low or band.end_high or band.hold_steps or band.schedule_steps):
        yield Problem(
            "entropy.band.schedule",
            band.schedule,
            "end_low, end_high, hold_steps and schedule_steps have no effect with this schedule",
            "set schedule to linear or cosine, or remove them",
        )
    if (band.schedule == "piecewise") != bool(band.points):
        problem = "piecewise needs points" if not band.points else f"points have no effect with {band.schedule}"
        yield Problem(
            "entropy.band.points", band.points, problem, "set schedule=piecewise and points=[[step, low, high], ...]"
        )
    for point in band.points:
        if len(point) != 3 or point[0] < 0 or point[0] != int(point[0]) or not 0 < point[1] < point[2]:
            remedy = "write [step, low, high] with a whole step and 0 < low < high"
            yield Problem("entropy.band.points", point, "not [step, low, high], " + edges, remedy)
    steps = [point[0] for point in band.points if point]
    if steps != sorted(set(steps)):
        yield Problem("entropy.band.points", band.points, "steps do not increase", "sort the points by step, each once")


def _limits(config: RunConfig) -> Iterator[Problem]:
    entropy = config.entropy
    low, high = entropy.command_min, entropy.command_max
    if low == 0 and high == 0:
        return
    if low >= high:
        yield Problem(
            "entropy.command_min", low, f"not below entropy.command_max ({high:g})", "swap or widen the limits"
        )
    elif entropy.actuator in TEMPERATURE_ACTUATORS and not 0 < low <= 1 <= high:
        yield Problem(
            "entropy.command_min",
            low,
            f"the temperature range [{low:g}, {high:g}] does not contain 1, the actuator's rest",
            "choose limits with 0 < command_min <= 1 <= command_max, e.g. 0.8 and 1.2",
        )
    elif entropy.actuator not in (*TEMPERATURE_ACTUATORS, "high_prob") and low < 0:
        yield Problem(
            "entropy.command_min",
            low,
            f"{entropy.actuator} takes no negative command: it collapses the policy",
            "set entropy.command_min=0",
        )
    elif entropy.actuator not in TEMPERATURE_ACTUATORS and low > 0:
        yield Problem(
            "entropy.command_min",
            low,
            f"{entropy.actuator} does nothing at a command of 0, which these limits do not contain",
            "set entropy.command_min=0",
        )
    elif entropy.actuator == "clip_cov" and high > 1:
        yield Problem(
            "entropy.command_max", high, "clip_cov's command is a share of tokens", "use a number up to 1, e.g. 0.2"
        )


def _controller(config: RunConfig) -> Iterator[Problem]:
    entropy = config.entropy
    made_for = CONTROLLER_ACTUATORS.get(entropy.controller)
    if made_for and entropy.actuator not in made_for:
        what = "a temperature" if made_for == TEMPERATURE_ACTUATORS else f"the coefficient of {made_for[0]}"
        remedy = (
            f"one of the actuators {', '.join(made_for)}" if len(made_for) > 1 else f"entropy.actuator={made_for[0]}"
        )
        yield Problem(
            "entropy.actuator",
            entropy.actuator,
            f"controller {entropy.controller} commands {what}, which this actuator does not take",
            f"use controller=pi, or {remedy}",
        )
    if not entropy.aent.least < entropy.aent.most:
        yield Problem(
            "entropy.aent.least",
            entropy.aent.least,
            f"not below entropy.aent.most ({entropy.aent.most:g})",
            "swap them",
        )
    if entropy.pi.ki > 0 and entropy.pi.kp == 0:
        yield Problem(
            "entropy.pi.ki",
            entropy.pi.ki,
            "has no effect while entropy.pi.kp is 0 (the actuator's measured gains)",
            "set both gains or neither",
        )
    if entropy.pi.split_range and (entropy.actuator != "resample" or entropy.controller != "pi"):
        yield Problem(
            "entropy.pi.split_range",
            True,
            f"only a second rollout has auxiliary prompts to add, not {entropy.controller} with {entropy.actuator}",
            "set controller=pi with actuator=resample, or split_range=false",
        )
    if (
        entropy.repeated_prompts
        and config.rollout.engine == "sglang"
        and DETERMINISTIC not in config.rollout.sglang.extra_args
    ):
        yield Problem(
            "entropy.repeated_prompts",
            entropy.repeated_prompts,
            "SGLang draws by a sample's own seed only in deterministic inference (on a GPU); without it the reading repeats nothing",
            f"add {DETERMINISTIC} to rollout.sglang.extra_args, or set entropy.repeated_prompts=0",
        )


def sink_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the choice of sinks on any machine."""
    chosen, uri = config.monitoring.sinks, config.monitoring.mlflow.tracking_uri
    unknown = [name for name in chosen if name not in SINKS]
    if unknown:
        yield Problem("monitoring.sinks", chosen, f"unknown: {', '.join(unknown)}", f"choose among {', '.join(SINKS)}")
    elif len(set(chosen)) < len(chosen):
        yield Problem("monitoring.sinks", chosen, "a sink is named twice", "name each once")
    if urlsplit(uri).password:
        what = "holds a password, which the run folder and every sink would show"
        remedy = "remove it and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        yield Problem("monitoring.mlflow.tracking_uri", re.sub(r"//.*@", "//...@", uri), what, remedy)


def _constant(config: RunConfig) -> Iterator[Problem]:
    entropy = config.entropy
    if entropy.controller != "constant":
        if entropy.command:
            yield Problem(
                "entropy.command",
                entropy.command,
                f"controller {entropy.controller} sets the command itself",
                "remove it, or set entropy.controller=constant",
            )
        return
    if not entropy.command:
        yield Problem(
            "entropy.command",
            entropy.command,
            f"at rest or impossible: {entropy.actuator} would do nothing",
            "give a command above 0, or set entropy.controller=none",
        )
    if entropy.actuator == "clip_cov" and entropy.command > 1:
        yield Problem("entropy.command", entropy.command, "clip_cov's command is a share of tokens", "use at most 1")


def _auxiliary(config: RunConfig) -> Iterator[Problem]:
    entropy, prompts = config.entropy, config.rollout.prompts_per_step
    if entropy.actuator != "resample":
        if entropy.auxiliary_replaces:
            yield Problem(
                "entropy.auxiliary_replaces",
                True,
                f"actuator {entropy.actuator} draws no auxiliary rows that could replace others",
                "set it to false, or entropy.actuator=resample",
            )
        return
    if entropy.auxiliary_prompts > prompts:
        yield Problem(
            "entropy.auxiliary_prompts",
            entropy.auxiliary_prompts,
            f"more than the step's prompts (rollout.prompts_per_step = {prompts}), which are the ones drawn again",
            f"use at most {prompts}",
        )
    most = entropy.auxiliary_max_prompts
    if most and not entropy.auxiliary_prompts <= most <= prompts:
        yield Problem(
            "entropy.auxiliary_max_prompts",
            most,
            f"not between auxiliary_prompts ({entropy.auxiliary_prompts}) and rollout.prompts_per_step ({prompts})",
            "use 0 (all prompts) or a number between them",
        )


RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _name,
    _batch,
    _processes,
    _colocated,
    _token_budget,
    _sequence_parallel,
    _pipeline,
    _experts,
    _overlap,
    _recompute,
    _kv_cache,
    _fp8_rollouts,
    _optimizer,
    _data,
    _verifier,
    _examples,
    _evaluation,
    _dual_clip,
    _correction,
    _band,
    _limits,
    _controller,
    _constant,
    _auxiliary,
    sink_problems,
    objective_problems,
    precision_problems,
)
