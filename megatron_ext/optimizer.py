"""Megatron's data parallelism, optimizer and learning-rate schedule, as ``learner.optimizer`` asks for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

import pipeline.config.schema as schema
from megatron_ext import models


def data_parallel(chunks: Sequence[GPTModel], learner: schema.LearnerConfig) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk: float32 main gradients, reduced over CP and DP once per optimizer step."""
    config = learner.optimizer
    wrapped = []
    for index, gpt in enumerate(chunks):
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.distributed,
            overlap_grad_reduce=config.overlap_grad_reduce,
            overlap_param_gather=config.overlap_param_gather,
            fp8_param_gather=learner.precision.fp8_param,
        )
        # Only of the first chunk is communication on the critical path, hence worth cutting into buckets.
        wrapped.append(DistributedDataParallel(gpt.config, settings, gpt, disable_bucketing=index > 0))
    # The schedule reads these from the first chunk's configuration.
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    if config.overlap_grad_reduce:
        pauses = [model.no_sync for model in wrapped]
        chunks[0].config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return wrapped


def build(wrapped: Sequence[DistributedDataParallel], learner: schema.LearnerConfig, dtype: str) -> MegatronOptimizer:
    """megatron-core's Adam with decoupled weight decay (none on biases and norms)."""
    config = learner.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad or math.inf,  # inf: never scaled, but the norm is still reported
            bf16=dtype == "bf16",
            params_dtype=models.DTYPES[dtype],
            use_distributed_optimizer=config.distributed,
            overlap_param_gather=config.overlap_param_gather,
            fp8_recipe=learner.precision.fp8_recipe if learner.precision.fp8_param else None,
        ),
        list(wrapped),
        use_gloo_process_groups=dist.get_backend() != "fake",
    )
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def schedule(optimizer: MegatronOptimizer, config: schema.OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    """Update ``k`` of ``n`` (from 1) runs at the schedule's point ``k`` of ``n + 1``: neither the first nor the last is
    at 0.
    """
    last = total_steps + 1
    if config.warmup_steps >= last and config.lr_schedule != "constant":
        raise ValueError(
            f"learner.optimizer.warmup_steps={config.warmup_steps} leaves none of the {total_steps} steps to decay"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(last, config.warmup_steps + 1),
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=last,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # of a checkpoint's schedule only num_steps is taken
        override_opt_param_scheduler=True,
    )
