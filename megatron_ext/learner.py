"""The Megatron learner: one rank of a policy under TP x PP x DP, implementing ``pipeline.learner.Learner``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

import pipeline.config.schema as schema
from megatron_ext import architecture, batching, checkpoint, models
from megatron_ext.fp8 import transformer_engine
from megatron_ext.logprobs import log_probs_and_entropy
from megatron_ext.topology import Topology, shutdown
from megatron_ext.weights import hf, identity, layout
from pipeline.objectives.loss import (
    PolicyOutputs,
    TokenRows,
    entropy_needs_grad,
    policy_loss,
    reduce_metrics,
    tempered_at,
)
from pipeline.types import EntropyReading, StepStats, TrainBatch, WeightBucket


class MegatronLearner:
    """One rank of the learner. Every rank makes the same calls in the same order with the same batch.

    Results do not depend on the layout or on ``micro_batch_size``: the batch's weights carry the whole normalisation, and
    the divisions that Megatron makes (by micro-batches and by DP size) are undone.
    """

    def __init__(
        self,
        learner: schema.LearnerConfig,
        model: schema.ModelConfig,
        objective: schema.ObjectiveConfig,
        *,
        total_steps: int,
        seed: int,
        topology: Topology,
    ) -> None:
        """Build model, optimizer and schedule for ``total_steps`` calls of :meth:`update`; weights come with ``load``.

        Raises ``ValueError`` on a model or layout that cannot be built.
        """
        torch.manual_seed(seed)
        self._config, self._objective, self._topology = learner, objective, topology
        self._hf_path = model.hf_path
        self._architecture = architecture.read(Path(model.hf_path))
        numerics = transformer_engine.resolve(learner, topology.device)
        # Sequence lengths are made a multiple of this: what FP8 products take of a rank's tokens.
        self._multiple = numerics.tokens_multiple * (topology.tp_size if learner.sequence_parallel else 1)
        self._gpt = models.build(self._architecture, topology, model.dtype, numerics=numerics)
        self._parameters = models.global_parameters(self._gpt)
        self._rows = layout.rows(self._architecture, topology.grid)
        itemsize = models.DTYPES[model.dtype].itemsize
        self._buckets = hf.plan(self._rows, itemsize, learner.bucket_mib)
        self._model = _data_parallel(self._gpt, learner)
        self._optimizer = _optimizer(self._model, learner, model.dtype)
        self._scheduler = _scheduler(self._optimizer, learner.optimizer, total_steps)
        self._forward_backward = get_forward_backward_func()
        # The frozen starting policy of the KL penalty, under this rank's parameter names.
        self._reference: dict[str, torch.Tensor] | None = None
        if objective.kl_coef > 0:
            self._reference = {name: torch.empty_like(p.data) for name, p in self._gpt.named_parameters()}

    def load(self, hf_path: Path) -> None:
        """Read this rank's slices of a Hugging Face folder; see ``pipeline.learner.Learner.load``."""
        with transformer_engine.filling(self._parameters) as parameters:
            hf.load(parameters, self._rows, self._architecture, Path(hf_path), self._topology)
        self._optimizer.reload_model_params()
        for name, parameter in self._gpt.named_parameters():
            if self._reference is not None:
                self._reference[name].copy_(parameter.data)

    @torch.no_grad()
    def log_probs(self, batch: TrainBatch, *, reference: bool = False) -> torch.Tensor:
        """T=1 log-probabilities of the targets, on every rank; see ``pipeline.learner.Learner.log_probs``."""
        topology = self._topology
        grid = torch.zeros(batch.loss_mask.shape, device=topology.device)
        indices = self._micro_batches(batch)
        with self._reference_policy() if reference else nullcontext():
            outputs = self._run(batch, indices, forward_only=True)
        for rows, log_probs in zip(indices, outputs, strict=False):  # no outputs but on the last stage
            real = rows[rows != batching.PADDING].to(topology.device)
            mask = batch.loss_mask.to(topology.device)[real]
            # In-place assignment through two masks does not write; fill the rows, then put them back.
            filled = torch.zeros(mask.shape, device=topology.device)
            filled[mask] = log_probs[: int(mask.sum())]
            grid[real] = filled
        for group, size in ((topology.dp_group, topology.dp_size), (topology.pp_group, topology.pp_size)):
            if size > 1:
                dist.all_reduce(grid, group=group)
        return grid.cpu()

    def update(self, batch: TrainBatch, step: int) -> StepStats:
        """``updates_per_step`` optimizer steps on ``batch`` at one learning rate; see ``pipeline.learner.Learner.update``.

        With several mini-batches the statistics are sums over all of them, each at the weights it met; the gradient norm
        is their mean. Raises ``FloatingPointError`` on a loss or gradient norm that is not finite, on every rank, before
        weights and optimizer state take that step.
        """
        start = time.perf_counter()
        self._scheduler.step(1)
        totals: dict[str, float] = {}
        norms = []
        for mini in batching.mini_batches(batch, self._config.updates_per_step):
            sums = self._accumulate(mini)
            _require_finite(sums["loss"], "loss", step)
            # What optimizer.step() does first, done here to look at the norm; it then comes to the same.
            self._optimizer.prepare_grads()
            norms.append(float(self._optimizer.get_grad_norm()))
            _require_finite(norms[-1], "gradient norm", step)
            self._optimizer.step()
            totals = _merge([totals, sums]) if totals else sums
        loss = totals.pop("loss")
        return StepStats(
            loss=loss,
            entropy=EntropyReading(sum=totals["entropy_sum"], count=totals["main_tokens"], step=step),
            grad_norm=sum(norms) / len(norms),
            learning_rate=self._optimizer.param_groups[0]["lr"],
            metrics=reduce_metrics(totals),
            seconds=time.perf_counter() - start,
        )

    @property
    def bucket_count(self) -> int:
        """How many buckets one export yields; the same for every version."""
        return len(self._buckets)

    def export_shards(self, version: int) -> Iterator[WeightBucket | None]:
        """One item per bucket on every rank: the bucket on global rank 0, ``None`` elsewhere. Exhaust it on all ranks."""
        parameters = transformer_engine.Dequantised(self._parameters)
        return hf.export(parameters, self._buckets, self._topology, version)

    def save(self, directory: Path) -> None:
        """Write the whole state; see ``pipeline.learner.Learner.save``."""
        checkpoint.save(Path(directory), self._gpt, self._optimizer, self._scheduler, self._reference, self._topology)
        if self._topology.rank == 0:
            identity.record(Path(directory), self._architecture)

    def restore(self, directory: Path) -> None:
        """Load what :meth:`save` wrote at the same layout; training goes on as if never interrupted.

        Hyper-parameters are this learner's own: with another configuration it goes on under that one. Raises ``ValueError`` that
        names every field in which the model is another.
        """
        identity.check(Path(directory), self._architecture, f"{self._hf_path}/config.json")
        checkpoint.restore(
            Path(directory), self._gpt, self._optimizer, self._scheduler, self._reference, self._topology
        )

    def close(self) -> None:
        """Leave the process groups."""
        shutdown()

    def _accumulate(self, batch: TrainBatch) -> dict[str, float]:
        """Gradients of one mini-batch into the main gradients; its metric sums, the same on every rank."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        sums = self._run(batch, self._micro_batches(batch), forward_only=False)
        return self._reduce(sums)

    def _micro_batches(self, batch: TrainBatch) -> tuple[torch.Tensor, ...]:
        topology = self._topology
        return batching.micro_batches(batch.rows, self._config.micro_batch_size, topology.dp_rank, topology.dp_size)

    def _run(self, batch: TrainBatch, indices: tuple[torch.Tensor, ...], *, forward_only: bool) -> list[Any]:
        """Megatron's schedule over the micro-batches: per micro-batch its log-probs or metric sums; last stage only."""
        # What Megatron divides the loss by, and the mini-batch rule of ``batching.mini_batches``.
        scale = len(indices) * self._topology.dp_size * self._config.updates_per_step
        finish = self._log_probs if forward_only else partial(self._loss, scale=scale)

        padding = -batch.loss_mask.shape[1] % self._multiple

        def forward(data: Iterator[TrainBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            micro = next(data)
            tokens, mask = (F.pad(grid, (0, padding)) for grid in (micro.tokens[:, :-1], micro.loss_mask))
            with models.only_targets(self._gpt, mask):
                return model(tokens, None, None), partial(finish, micro)

        return self._forward_backward(
            forward_step_func=forward,
            data_iterator=(batching.take(batch, rows, self._topology.device) for rows in indices),
            model=self._model,
            num_microbatches=len(indices),
            seq_length=batch.loss_mask.shape[1] + padding,
            micro_batch_size=len(indices[0]),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _outputs(self, micro: TrainBatch, logits: torch.Tensor) -> PolicyOutputs:
        """Per-token quantities from ``logits`` ``[1, n, vocab / tp]``, which are consumed."""
        return PolicyOutputs(
            *log_probs_and_entropy(
                logits[0],
                micro.tokens[:, 1:][micro.loss_mask],
                vocab_size=self._architecture.vocab,
                group=self._topology.tp_group,
                temperature=tempered_at(micro.actuation),
                entropy_grad=entropy_needs_grad(micro.actuation),
            )
        )

    def _log_probs(self, micro: TrainBatch, logits: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return self._outputs(micro, logits).log_probs

    def _loss(
        self, micro: TrainBatch, logits: torch.Tensor, *, scale: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = policy_loss(self._outputs(micro, logits), TokenRows.of(micro), self._objective)
        return loss * scale, {**sums, "loss": loss.detach().double()}

    def _reduce(self, micro_sums: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums (maxima for ``*_max``) over micro-batches and DP, then to all stages: one collective each, none alone."""
        topology = self._topology
        box: list[dict[str, float] | None] = [None]
        if topology.last_stage:
            keys = sorted(micro_sums[0])
            values = torch.stack([torch.stack([sums[key] for key in keys]) for sums in micro_sums])
            if topology.dp_size > 1:
                gathered = values.new_zeros(topology.dp_size, *values.shape)
                gathered[topology.dp_rank] = values
                dist.all_reduce(gathered, group=topology.dp_group)
                values = gathered.flatten(0, 1)
            box = [_merge([dict(zip(keys, row, strict=True)) for row in values.tolist()])]
        if topology.pp_size > 1:
            dist.broadcast_object_list(box, group=topology.pp_group, group_src=topology.pp_size - 1)
        assert box[0] is not None
        return box[0]

    @contextmanager
    def _reference_policy(self) -> Iterator[None]:
        """Within, the model computes with the reference's parameters; exchanged, not copied."""
        if self._reference is None:
            raise ValueError("no reference policy was kept: log_probs(reference=True) needs objective.kl_coef > 0")
        own = {name: parameter.data for name, parameter in self._gpt.named_parameters()}
        try:
            for name, parameter in self._gpt.named_parameters():
                parameter.data = self._reference[name]
            yield
        finally:
            for name, parameter in self._gpt.named_parameters():
                parameter.data = own[name]


def _merge(parts: list[dict[str, float]]) -> dict[str, float]:
    """Metric sums added up; the maximum of those that end in ``_max``."""
    return {key: (max if key.endswith("_max") else math.fsum)([part[key] for part in parts]) for key in parts[0]}


def _require_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {step}: {what} is {value}; that optimizer step was not taken. "
            "Lower learner.optimizer.lr or set learner.optimizer.clip_grad"
        )


def _data_parallel(gpt: GPTModel, learner: schema.LearnerConfig) -> DistributedDataParallel:
    """Megatron's DDP: float32 main gradients in one buffer, reduced over DP once per optimizer step."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=learner.optimizer.distributed,
        overlap_grad_reduce=False,
        fp8_param_gather=learner.precision.fp8_param,
    )
    gpt.config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(gpt.config, config, gpt)


def _optimizer(model: DistributedDataParallel, learner: schema.LearnerConfig, dtype: str) -> MegatronOptimizer:
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
            fp8_recipe=learner.precision.fp8_recipe if learner.precision.fp8_param else None,
        ),
        [model],
    )
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _scheduler(
    optimizer: MegatronOptimizer, config: schema.OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    """Update ``k`` of ``n`` (from 1) runs at the schedule's point ``k`` of ``n + 1``: neither the first nor the last is at 0."""
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
