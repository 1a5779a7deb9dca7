"""Rules between keys of ``learner``: ranks, batches, layers, recomputation and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.errors import Problem
from pipeline.config.schema import LearnerConfig, RunConfig


def learner_problems(config: RunConfig) -> Iterator[Problem]:
    """Every combination of learner keys that cannot work, or in which one of them would have no effect."""
    yield from _batch(config)
    yield from _processes(config)
    yield from _token_budget(config)
    yield from _sequence_parallel(config)
    yield from _pipeline(config)
    yield from _experts(config)
    yield from _overlap(config)
    yield from _recompute(config)
    yield from _optimizer(config)


def _batch(config: RunConfig) -> Iterator[Problem]:
    rollout, learner = config.rollout, config.learner
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    product = (
        f"a step has {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples "
        f"(rollout.prompts_per_step x rollout.samples_per_prompt) = {rows} rows"
    )
    if rows % learner.updates_per_step:
        divisors = [n for n in range(1, min(rows, 2 * learner.updates_per_step) + 1) if rows % n == 0]
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
            f"one process cannot hold TP {tensor} x CP {context} x PP {pipeline} x DP {data} = {processes} learner "
            "processes",
            "set runtime=ray, or the learner.*_parallel_size to 1",
        )


def _token_budget(config: RunConfig) -> Iterator[Problem]:
    learner = config.learner
    budget, length = learner.max_tokens_per_micro_batch, config.longest_row
    if 0 < budget < length:
        yield Problem(
            "learner.max_tokens_per_micro_batch",
            budget,
            f"cannot hold one row: {config.longest_row_words}",
            f"use at least {length}, better several times as many, or 0 (micro_batch_size rows)",
        )
    if learner.packing and not budget:
        yield Problem(
            "learner.packing",
            True,
            "micro-batches of so many rows would be packed sequences of any length",
            f"set learner.max_tokens_per_micro_batch to {length} or more, or packing=false",
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
            f"EP {learner.expert_model_parallel_size} x expert-TP {tensor} does not divide the {ranks} ranks of a "
            f"stage (TP {learner.tensor_model_parallel_size} x CP {learner.context_parallel_size} x DP "
            f"{learner.data_parallel_size})",
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


def _optimizer(config: RunConfig) -> Iterator[Problem]:
    optimizer = config.learner.optimizer
    if len(optimizer.betas) != 2:
        yield Problem(
            "learner.optimizer.betas",
            optimizer.betas,
            "not two numbers",
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
