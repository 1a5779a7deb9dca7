"""The Megatron learner: one rank of a policy under TP x CP x PP x DP, implementing ``pipeline.learner.Learner``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from megatron_ext import architecture, batching, checkpoint, context_parallel, models
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
        # Model chunks of this rank: one, or as many as virtual stages.
        self._chunks = models.build_chunks(self._architecture, topology, model.dtype, learner)
        self._parameters = {
            name: tensor for gpt in self._chunks for name, tensor in models.global_parameters(gpt).items()
        }
        self._rows = layout.rows(self._architecture, topology.grid)
        itemsize = models.DTYPES[model.dtype].itemsize
        self._buckets = hf.plan(self._rows, itemsize, learner.bucket_mib)
        self._models = _data_parallel(self._chunks, learner.optimizer)
        self._optimizer = _optimizer(self._models, learner.optimizer, model.dtype)
        self._scheduler = _scheduler(self._optimizer, learner.optimizer, total_steps)
        self._forward_backward = get_forward_backward_func()
        # The frozen starting policy of the KL penalty, per chunk under its parameter names; empty without a penalty.
        self._reference: list[dict[str, torch.Tensor]] = []
        if objective.kl_coef > 0:
            self._reference = [
                {name: torch.empty_like(p.data) for name, p in gpt.named_parameters()} for gpt in self._chunks
            ]

    def load(self, hf_path: Path) -> None:
        """Read this rank's slices of a Hugging Face folder; see ``pipeline.learner.Learner.load``."""
        hf.load(self._parameters, self._rows, self._architecture, Path(hf_path), self._topology)
        self._optimizer.reload_model_params()
        for gpt, reference in zip(self._chunks, self._reference, strict=False):
            for name, parameter in gpt.named_parameters():
                reference[name].copy_(parameter.data)

    @torch.no_grad()
    def log_probs(self, batch: TrainBatch, *, reference: bool = False) -> torch.Tensor:
        """T=1 log-probabilities of the targets, on every rank; see ``pipeline.learner.Learner.log_probs``."""
        topology, columns = self._topology, batch.loss_mask.shape[1]
        batch = self._padded(batch)
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
        return grid[:, :columns].cpu()

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
        if (
            self._config.optimizer.overlap_param_gather
        ):  # left to the next forward pass, but an export may come before it
            for model in self._models:
                model.start_param_sync(force_sync=True)
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
        return hf.export(self._parameters, self._buckets, self._topology, version)

    def save(self, directory: Path) -> None:
        """Write the whole state; see ``pipeline.learner.Learner.save``."""
        checkpoint.save(
            Path(directory), self._chunks, self._optimizer, self._scheduler, self._reference, self._topology
        )
        if self._topology.rank == 0:
            identity.record(Path(directory), self._architecture)

    def restore(self, directory: Path) -> None:
        """Load what :meth:`save` wrote at the same layout; training goes on as if never interrupted.

        Hyper-parameters are this learner's own: with another configuration it goes on under that one. Raises ``ValueError`` that
        names every field in which the model is another.
        """
        identity.check(Path(directory), self._architecture, f"{self._hf_path}/config.json")
        checkpoint.restore(
            Path(directory), self._chunks, self._optimizer, self._scheduler, self._reference, self._topology
        )

    def close(self) -> None:
        """Leave the process groups."""
        shutdown()

    def _accumulate(self, batch: TrainBatch) -> dict[str, float]:
        """Gradients of one mini-batch into the main gradients; its metric sums, the same on every rank."""
        for model in self._models:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()
        batch = self._padded(batch)
        sums = self._run(batch, self._micro_batches(batch), forward_only=False)
        return self._reduce(sums)

    def _padded(self, batch: TrainBatch) -> TrainBatch:
        """``batch`` in a length that CP, and within its parts sequence parallelism, divide."""
        chunks = 2 * self._topology.cp_size if self._topology.cp_size > 1 else 1
        return batching.pad(batch, chunks * (self._topology.tp_size if self._config.sequence_parallel else 1))

    def _micro_batches(self, batch: TrainBatch) -> tuple[torch.Tensor, ...]:
        topology = self._topology
        # The interleaved schedule takes micro-batches in groups of one per stage.
        multiple = topology.pp_size if topology.grid.vpp > 1 else 1
        size = self._config.micro_batch_size
        return batching.micro_batches(batch.rows, size, topology.dp_rank, topology.dp_size, multiple)

    def _run(self, batch: TrainBatch, indices: tuple[torch.Tensor, ...], *, forward_only: bool) -> list[Any]:
        """Megatron's schedule over the micro-batches: per micro-batch its log-probs or metric sums; last stage only."""
        # What Megatron divides the loss by, and the mini-batch rule of ``batching.mini_batches``.
        scale = len(indices) * self._topology.dp_size * self._config.updates_per_step
        finish = self._log_probs if forward_only else partial(self._loss, scale=scale)

        def forward(data: Iterator[TrainBatch], model: DistributedDataParallel) -> tuple[torch.Tensor, Any]:
            micro = next(data)
            tokens = context_parallel.shard(micro.tokens[:, :-1], self._topology)
            with models.only_targets(model.module, context_parallel.own_targets(micro.loss_mask, self._topology)):
                return model(tokens, None, None), partial(finish, micro)

        def data() -> Iterator[TrainBatch]:
            return (batching.take(batch, rows, self._topology.device) for rows in indices)

        interleaved = len(self._models) > 1
        return self._forward_backward(
            forward_step_func=forward,
            data_iterator=[data() for _ in self._models] if interleaved else data(),
            model=self._models if interleaved else self._models[0],
            num_microbatches=len(indices),
            seq_length=batch.loss_mask.shape[1],
            micro_batch_size=len(indices[0]),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _outputs(self, micro: TrainBatch, logits: torch.Tensor) -> PolicyOutputs:
        """Per-token quantities of all targets from this rank's ``logits`` ``[1, n, vocab / tp]``, which are consumed."""
        own = context_parallel.own_targets(micro.loss_mask, self._topology)
        outputs = PolicyOutputs(
            *log_probs_and_entropy(
                logits[0],
                context_parallel.shard(micro.tokens[:, 1:], self._topology)[own],
                vocab_size=self._architecture.vocab,
                group=self._topology.tp_group,
                temperature=tempered_at(micro.actuation),
                entropy_grad=entropy_needs_grad(micro.actuation),
            )
        )
        return context_parallel.gather(outputs, micro.loss_mask, self._topology)

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
        if not self._reference:
            raise ValueError("no reference policy was kept: log_probs(reference=True) needs objective.kl_coef > 0")
        pairs = [
            (parameter, reference[name])
            for gpt, reference in zip(self._chunks, self._reference, strict=True)
            for name, parameter in gpt.named_parameters()
        ]
        own = [parameter.data for parameter, _ in pairs]
        try:
            for parameter, reference in pairs:
                parameter.data = reference
            yield
        finally:
            for (parameter, _), data in zip(pairs, own, strict=True):
                parameter.data = data


def _merge(parts: list[dict[str, float]]) -> dict[str, float]:
    """Metric sums added up; the maximum of those that end in ``_max``."""
    return {key: (max if key.endswith("_max") else math.fsum)([part[key] for part in parts]) for key in parts[0]}


def _require_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {step}: {what} is {value}; that optimizer step was not taken. "
            "Lower learner.optimizer.lr or set learner.optimizer.clip_grad"
        )


def _data_parallel(chunks: Sequence[GPTModel], config: schema.OptimizerConfig) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk: float32 main gradients, reduced over CP and DP once per optimizer step."""
    wrapped = []
    for index, gpt in enumerate(chunks):
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.distributed,
            overlap_grad_reduce=config.overlap_grad_reduce,
            overlap_param_gather=config.overlap_param_gather,
        )
        # Only of the first chunk is communication on the critical path, hence worth cutting into buckets.
        wrapped.append(DistributedDataParallel(gpt.config, settings, gpt, disable_bucketing=index > 0))
    # The schedule reads these from the first chunk's configuration.
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    if config.overlap_grad_reduce:
        pauses = [model.no_sync for model in wrapped]
        chunks[0].config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return wrapped


def _optimizer(
    wrapped: Sequence[DistributedDataParallel], config: schema.OptimizerConfig, dtype: str
) -> MegatronOptimizer:
    """megatron-core's Adam with decoupled weight decay (none on biases and norms)."""
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
        ),
        list(wrapped),
    )
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
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
