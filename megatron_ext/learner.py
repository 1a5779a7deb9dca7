"""The Megatron learner: one rank of a policy under TP x CP x PP x DP, implementing ``pipeline.learner.Learner``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

import pipeline.config.schema as schema
from megatron_ext import context_parallel, inputs, lora, models, optimizer
from megatron_ext.checkpoint import Checkpointer
from megatron_ext.fp8 import transformer_engine
from megatron_ext.head import Head
from megatron_ext.routing import Routing
from megatron_ext.topology import Topology, shutdown
from megatron_ext.weights import hf
from pipeline.batching import dealing
from pipeline.fingerprints import Files
from pipeline.model import architecture, identity, layout
from pipeline.model.lora import check, record
from pipeline.objectives.loss import (
    SENSOR_SUMS,
    PolicyOutputs,
    TokenRows,
    entropy_needs_grad,
    policy_loss,
    reduce_metrics,
    tempered_at,
)
from pipeline.reshard.execute import LearnerShards, QuantisedShards
from pipeline.reshard.order import Order
from pipeline.reshard.participant import Participant
from pipeline.types import EntropyReading, Share, StepStats, TrainBatch, positions

MicroBatch = tuple[TrainBatch, inputs.ModelInputs]  # the rows, and what the model is given for them


class MegatronLearner:
    """One rank of the learner. Every rank makes the same calls in the same order with the same batch, whole or its
    share of it.

    Results do not depend on the layout or on how rows are cut into micro-batches: the batch's weights carry the whole
    normalisation, and the divisions that Megatron makes (by micro-batches and by DP size) are undone.
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
        """Build model, optimizer and schedule for ``total_steps`` calls of ``update``; weights come with ``load``.

        Raises ``ValueError`` on a model or layout that cannot be built.
        """
        torch.manual_seed(seed)
        self._config, self._objective, self._topology = learner, objective, topology
        self._hf_path = model.hf_path
        self._architecture = architecture.read(Path(model.hf_path))
        # Model chunks of this rank: one, or as many as virtual stages.
        self._chunks = models.build_chunks(self._architecture, topology, model.dtype, learner)
        named = {name: tensor for gpt in self._chunks for name, tensor in models.global_parameters(gpt).items()}
        self._parameters, self._adapters = lora.base(named), lora.find(self._chunks)
        self._seed = seed
        self._head = Head(
            self._chunks[-1], self._architecture.vocab, topology.tp_group, topology.device, learner.log_prob_kernel
        )
        self._routing = Routing(self._chunks, self._architecture, topology)
        self._rows = layout.rows(self._architecture, topology.grid)
        self._held = [row for row in self._rows if row.part(topology.grid, topology.rank)]  # by this rank
        self._participant = Participant()  # in weight updates
        self._store: dist.TCPStore | None = None
        # How this learner deals a batch to its data-parallel ranks; on every rank the same.
        cut = _cut(learner, inputs.alignment(self._chunks[0].config))
        self.dealer = dealing.Dealer(cut, topology.dp_size, learner.updates_per_step)
        self._models = optimizer.data_parallel(self._chunks, learner)
        self._optimizer = optimizer.build(self._models, learner, model.dtype)
        self._scheduler = optimizer.schedule(self._optimizer, learner.optimizer, total_steps)
        self._forward_backward = get_forward_backward_func()
        # The frozen starting policy of the KL penalty, per chunk under its parameter names; empty without a penalty,
        # and where the reference is the model without its adapters.
        self._reference: list[dict[str, torch.Tensor]] = []
        if objective.kl_coef > 0 and not self._adapters:
            self._reference = [
                {name: torch.empty_like(p.data) for name, p in gpt.named_parameters()} for gpt in self._chunks
            ]
        self._checkpointer = Checkpointer(self._chunks, self._optimizer, self._scheduler, self._reference, topology)

    def load(self, hf_path: Path) -> None:
        """Read this rank's slices of a Hugging Face folder; see ``pipeline.learner.Learner.load``."""
        with transformer_engine.filling(self._parameters) as parameters:
            hf.load(parameters, self._rows, self._architecture, Path(hf_path), self._topology)
        for adapter in self._adapters.values():
            adapter.reset(self._seed)
        self._optimizer.reload_model_params()
        for gpt, reference in zip(self._chunks, self._reference, strict=False):
            for name, parameter in gpt.named_parameters():
                reference[name].copy_(parameter.data)

    def empty_cache(self) -> None:
        """See ``pipeline.learner.Learner.empty_cache``."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def log_probs(self, batch: TrainBatch | Share, *, reference: bool = False) -> torch.Tensor:
        """T=1 log-probabilities of the targets; see ``pipeline.learner.Learner.log_probs``.

        Of a share, on the rank that ``speaks`` for it; of a whole batch, on every rank.
        """
        with self._reference_policy() if reference else nullcontext():
            return self._measured(batch, ("log_probs",), replay=not reference)["log_probs"]

    @torch.no_grad()
    def statistics(self, batch: TrainBatch | Share) -> dict[str, torch.Tensor]:
        """Log-probs, entropy and moment of the targets; see ``pipeline.learner.Learner.statistics``, and
        ``log_probs`` for where.
        """
        return self._measured(batch, ("log_probs", "entropy", "moment"))

    def update(self, batch: TrainBatch | Share, step: int) -> StepStats:
        """``updates_per_step`` optimizer steps on ``batch`` at one learning rate; see
        ``pipeline.learner.Learner.update``.

        With several mini-batches the statistics are sums over all of them, each at the weights it met; the gradient
        norm is their mean. Raises ``FloatingPointError`` on a loss or gradient norm that is not finite, on every rank,
        before weights and optimizer state take that step.
        """
        start = time.perf_counter()
        share = self._share(batch, for_update=True)
        if len(share.micro_batches) > 1 and share.batch.old_log_probs is None:
            raise ValueError("learner.updates_per_step > 1 needs old_log_probs: later mini-batches are off-policy")
        if self._config.routing_replay == "routes" and share.batch.routes is None:
            raise ValueError("learner.routing_replay=routes: the samples carry no routes; their engine recorded none")
        self._scheduler.step(1)
        totals: dict[str, float] = {}
        norms = []
        first = 0
        for sizes in share.micro_batches:
            sums = self._accumulate(share.batch, first, sizes)
            first += sum(sizes)
            _require_finite(sums["loss"], "loss", step)
            # What optimizer.step() does first, done here to look at the norm; it then comes to the same.
            self._optimizer.prepare_grads()
            norms.append(float(self._optimizer.get_grad_norm()))
            _require_finite(norms[-1], "gradient norm", step)
            self._optimizer.step()
            totals = _merge([totals, sums]) if totals else sums
        if self._config.optimizer.overlap_param_gather:  # left to the next forward pass; an export may come before it
            for model in self._models:
                model.start_param_sync(force_sync=True)
        balance = self._routing.balance(self._config.moe_router_bias_update_rate)
        loss = totals.pop("loss")
        return StepStats(
            loss=loss,
            entropy=_reading(totals, step, share.batch.staleness),
            grad_norm=sum(norms) / len(norms),
            learning_rate=self._optimizer.param_groups[0]["lr"],
            metrics=_batching_metrics(totals) | reduce_metrics(totals) | balance,
            seconds=time.perf_counter() - start,
        )

    def meeting_point(self, *, one_machine: bool = True) -> tuple[str, int]:
        """This process's store; whoever drives ranks on several machines knows its host."""
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return "127.0.0.1", self._store.port

    @torch.no_grad()
    def send(self, order: Order) -> None:
        """This rank's part; see ``pipeline.learner.Learner.send``."""
        topology = self._topology
        parameters = lora.Merged(transformer_engine.Dequantised(self._parameters), self._adapters)
        shards = LearnerShards(self._held, topology.grid, topology.rank, parameters)
        reader = QuantisedShards(shards) if order.inputs.dtype.startswith("fp8") else shards
        self._participant.send(order, topology.rank, reader, topology.device)

    def save(self, directory: Path) -> Callable[[], Files]:
        """Copy the whole state, to be written by what is returned; see ``pipeline.learner.Learner.save``."""
        write = self._checkpointer.save(Path(directory))
        if self._topology.rank == 0:
            identity.record(Path(directory), self._architecture)
            record(Path(directory), self._config.lora)
        return write

    def restore(self, directory: Path, files: Files) -> None:
        """Load what ``save`` wrote at the same layout; training goes on as if never interrupted.

        Hyper-parameters are this learner's own: with another configuration it goes on under that one. Raises
        ``ValueError`` that names every field in which the model is another, or its adapters are.
        """
        identity.check(Path(directory), self._architecture, f"{self._hf_path}/config.json")
        check(Path(directory), self._config.lora)
        self._checkpointer.restore(Path(directory), files)

    def close(self) -> None:
        """Leave the process groups."""
        self._participant.close()
        shutdown()

    @property
    def data_parallel_rank(self) -> int:
        """Which share of a batch is this rank's."""
        return self._topology.dp_rank

    @property
    def speaks(self) -> bool:
        """Whether this one, of the ranks with its share of a batch, says what was measured of it."""
        return self._topology.last_stage and self._topology.tp_rank == 0 and self._topology.cp_rank == 0

    def _share(self, batch: TrainBatch | Share, *, for_update: bool) -> Share:
        """This rank's share of ``batch``, if that is not it."""
        if isinstance(batch, Share):
            return batch
        return next(self.dealer.shares(batch, [self.data_parallel_rank], for_update=for_update))

    def _measured(
        self, batch: TrainBatch | Share, names: Sequence[str], *, replay: bool = True
    ) -> dict[str, torch.Tensor]:
        """Fields of ``PolicyOutputs`` of all targets of a share or a batch, float32 ``[targets]`` each on the CPU.

        Of a share on the ranks of the last stage (elsewhere nothing), without a word between replicas. Of a whole batch
        on every rank. ``replay``: by the rows' routes, where they have any.
        """
        share = self._share(batch, for_update=False)
        (sizes,) = share.micro_batches
        rows = share.batch if replay else replace(share.batch, routes=None)
        outputs = self._run(rows, 0, sizes, forward_only=True, names=names)
        # No outputs but on the last stage; an empty micro-batch has a dummy's, which are no row's.
        real = [values.T for size, values in zip(sizes, outputs, strict=False) if size]
        own = torch.cat(real, dim=1).float() if real else torch.zeros(len(names), 0, device=self._topology.device)
        found = own if isinstance(batch, Share) else self._everywhere(own, share)
        # Copies: pickled, a view takes the storage of all with it.
        return {name: values.to("cpu", copy=True) for name, values in zip(names, found, strict=True)}

    def _everywhere(self, own: torch.Tensor, share: Share) -> torch.Tensor:
        """``[names, n]`` of every share, those of each on its last stage, as ``[names, targets]`` of the whole batch on
        every rank.
        """
        topology = self._topology
        found = torch.zeros(len(own), share.total, device=topology.device)
        if topology.last_stage:
            found[:, positions(share.place).to(topology.device)] = own
        for group, ranks in ((topology.dp_group, topology.dp_size), (topology.pp_group, topology.pp_size)):
            if ranks > 1:
                dist.all_reduce(found, group=group)
        return found

    def _accumulate(self, batch: TrainBatch, first: int, sizes: Sequence[int]) -> dict[str, float]:
        """Gradients of one mini-batch, as in ``_run``, into the main gradients; its metric sums, the same on every
        rank.
        """
        for model in self._models:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()
        return self._reduce(self._run(batch, first, sizes, forward_only=False))

    def _run(
        self, batch: TrainBatch, first: int, sizes: Sequence[int], *, forward_only: bool, names: Sequence[str] = ()
    ) -> list[Any]:
        """Megatron's schedule over micro-batches of so many rows each, the first of which begins at row ``first``.

        Per micro-batch what was asked for by ``names``, or metric sums; last stage only.
        """
        # What Megatron divides the loss by, and the mini-batch rule of ``dealing.mini_batches``.
        scale = len(sizes) * self._topology.dp_size * self._config.updates_per_step
        finish = partial(self._named, names=names) if forward_only else partial(self._loss, scale=scale)

        def forward(data: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[torch.Tensor, Any]:
            rows, given = next(data)
            tokens = context_parallel.shard(given.tokens, given.own)
            with self._head.selecting(context_parallel.own_targets(given.targets, given.own)):
                compute = partial(model, tokens, None, None, packed_seq_params=given.packed)
                return self._routing.follow(given, compute), partial(finish, rows, given)

        def data() -> Iterator[MicroBatch]:
            starts = accumulate(sizes, initial=first)
            return map(partial(self._micro_batch, batch), starts, sizes)

        interleaved = len(self._models) > 1
        return self._forward_backward(
            forward_step_func=forward,
            data_iterator=[data() for _ in self._models] if interleaved else data(),
            model=self._models if interleaved else self._models[0],
            num_microbatches=len(sizes),
            # Unused: shapes differ between micro-batches, and pipeline stages tell each other.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _micro_batch(self, batch: TrainBatch, first: int, size: int) -> MicroBatch:
        rows = batch.take(torch.arange(first, first + size)) if size else dealing.dummy(batch)
        device, cut = self._topology.device, self.dealer.cut
        cp = (self._topology.cp_rank, self._topology.cp_size)
        given = inputs.build(rows, packing=cut.packed, align=cut.align, cp=cp)
        if not size:
            given = replace(given, filled=torch.zeros_like(given.filled))
        return dealing.on_device(rows, device), given.to(device)

    def _outputs(
        self, micro: TrainBatch, given: inputs.ModelInputs, hidden: torch.Tensor, *, moment: bool
    ) -> PolicyOutputs:
        """Per-token quantities of all targets from the ``hidden`` states ``[1, n, hidden size]`` of this rank's."""
        own = context_parallel.own_targets(given.targets, given.own)
        act, targets = micro.actuation, context_parallel.shard(given.labels, given.own)[own]
        said = self._head(
            hidden, targets, temperature=tempered_at(act), entropy_grad=entropy_needs_grad(act), moment=moment
        )
        return context_parallel.gather(PolicyOutputs(*said), given.targets, given.own, self._topology.cp_group)

    def _named(
        self,
        micro: TrainBatch,
        given: inputs.ModelInputs,
        hidden: torch.Tensor,
        non_loss_data: bool,
        *,
        names: Sequence[str],
    ) -> torch.Tensor:
        """Fields of ``PolicyOutputs``, ``[n, names]``."""
        outputs = self._outputs(micro, given, hidden, moment="moment" in names)
        return torch.stack([getattr(outputs, name) for name in names], dim=-1)

    def _loss(
        self, micro: TrainBatch, given: inputs.ModelInputs, hidden: torch.Tensor, *, scale: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = policy_loss(self._outputs(micro, given, hidden, moment=True), TokenRows.of(micro), self._objective)
        counted = {"micro_batches": 1, "positions": given.tokens.numel(), "real_positions": given.real}
        counts = {name: sums["main_tokens"].new_tensor(number) for name, number in counted.items()}
        return loss * scale, {**sums, **counts, "loss": loss.detach().double()}

    def _reduce(self, micro_sums: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums (maxima for ``*_max``) over micro-batches and DP, then to all stages: one collective each, none
        alone.
        """
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
        """Within, the model computes with the reference's parameters; exchanged, not copied.

        Adapters are switched off: what they are trained beside is the reference.
        """
        if self._adapters and self._objective.kl_coef > 0:
            with lora.without(self._adapters.values()):
                yield
            return
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


def _reading(totals: dict[str, float], step: int, staleness: float) -> EntropyReading:
    """Over the main tokens; weighted where they are stale."""
    entropy, tokens = SENSOR_SUMS if staleness else ("entropy_sum", "main_tokens")
    return EntropyReading(totals[entropy], totals[tokens], step=step, staleness=staleness)


def _cut(learner: schema.LearnerConfig, align: int) -> dealing.Cut:
    """Micro-batches as configured: by tokens, else by rows."""
    interleaved = learner.virtual_pipeline_model_parallel_size > 1
    return dealing.Cut(
        max_rows=0 if learner.max_tokens_per_micro_batch else learner.micro_batch_size,
        max_tokens=learner.max_tokens_per_micro_batch,
        packed=learner.packing,
        align=align,
        row_align=context_parallel.multiple(learner.context_parallel_size),
        multiple_of=learner.pipeline_model_parallel_size if interleaved else 1,
    )


def _batching_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Takes the counts of micro-batches out of ``totals``: tokens that one computes, and the share that is padding."""
    micro_batches, positions, real = (totals.pop(name) for name in ("micro_batches", "positions", "real_positions"))
    return {"tokens_per_micro_batch": positions / micro_batches, "padding_fraction": 1 - real / positions}


def _merge(parts: list[dict[str, float]]) -> dict[str, float]:
    """Metric sums added up; the maximum of those that end in ``_max``."""
    return {key: (max if key.endswith("_max") else math.fsum)([part[key] for part in parts]) for key in parts[0]}


def _require_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {step}: {what} is {value}; that optimizer step was not taken. "
            "Lower learner.optimizer.lr or set learner.optimizer.clip_grad"
        )
