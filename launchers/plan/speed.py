"""Counts the operations of a step, and predicts the seconds that they take at a stated speed.

A multiplication and an addition are two operations. The backward pass costs twice the forward pass, once where weights
are not trained (adapters). Attention is causal: half of the products of queries and keys count (arXiv 2205.05198,
appendix A, with that half).
"""

from __future__ import annotations

from dataclasses import dataclass

from launchers.plan.parameters import stored_in_fp8
from launchers.plan.schedule import bubble
from launchers.plan.work import Work, table
from pipeline.model.layout import Row
from pipeline.model.lora import Adapter


@dataclass(frozen=True)
class Machine:
    """What one GPU is assumed to do."""

    tflops: float = 989.0  # dense bf16 peak, 10^12 operations a second; 989: H100 SXM's data sheet
    # share of it that a GPU reaches while it computes; communication in its way is part of it
    utilization: float = 0.45
    fp8_speedup: float = 1.3  # of products in FP8 over bf16, casts included


@dataclass(frozen=True)
class Forward:
    """Operations of one forward pass of one micro-batch through one pipeline stage, over all of its ranks."""

    linear: float  # matrices of the layers
    fp8: float  # those of them that are in FP8
    experts: float  # those of them that are in experts
    attention: float
    output: float  # output layer, at the targets
    adapters: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.linear + self.attention + self.output + self.adapters


@dataclass(frozen=True)
class Speed:
    """One step's train phase."""

    model_flops: float  # forward and backward of the rows as expected, without padding, over all GPUs
    executed_flops: float  # with padding, recomputation and the forward passes of log_probs
    seconds: float
    bubble: float  # share of the time that the pipeline waits
    slowest_stage: float  # time of the slowest stage over the mean
    mfu: float  # model_flops / (seconds x GPUs x peak)
    tokens_per_second: float  # of prompts and responses


@dataclass(frozen=True)
class Matrices:
    """Entries by which each token is multiplied in the layers of one pipeline stage.

    Of the experts: the share that is chosen.
    """

    all: float
    fp8: float  # those of them that are in FP8
    experts: float  # those of them that are in experts
    adapters: float = 0.0  # beside ``all``


def matrices(work: Work, stage: int) -> Matrices:
    """Of the layers of ``stage``."""
    everything = fp8 = experts = 0.0
    for row in table(work.model, work.grid)[stage]:
        if row.layer is None or len(row.sources[0].shape) != 2:
            continue
        entries = row.entries * _share(work, row)
        everything += entries
        fp8 += entries if stored_in_fp8(work, row) else 0.0
        experts += entries if row.expert is not None else 0.0
    adapters = sum(_adapter_entries(work, each) for each in work.adapters.values() if each.base.stage == stage)
    return Matrices(everything, fp8, experts, adapters)


def forward(work: Work, stage: int, weights: Matrices, count: float, length: float) -> Forward:
    """One forward pass of ``count`` rows of ``length`` tokens each; ``weights`` are those of the stage."""
    model, operations = work.model, 2 * count * length
    widths = (model.head_dim, model.head_dim)
    if model.mla:
        widths = (model.mla.nope_dim + model.mla.rope_dim, model.mla.v_dim)
    layers = sum(not model.is_delta(layer) for span in work.grid.chunks(model.layers)[stage] for layer in span)
    attention = layers * count * length**2 * model.heads * sum(widths)
    last = stage == work.grid.pp - 1
    output = 2 * count * min(work.expected_targets, length) * model.vocab * model.hidden if last else 0.0
    return Forward(
        linear=operations * weights.all,
        fp8=operations * weights.fp8,
        experts=operations * weights.experts,
        attention=attention,
        output=output,
        adapters=operations * weights.adapters,
    )


def speed(work: Work, machine: Machine) -> Speed:
    """Operations and predicted seconds of one step's train phase: ``log_probs`` passes and updates.

    Weight sync and rollout are not in it.
    """
    stages = range(work.grid.pp)
    weights = [matrices(work, stage) for stage in stages]
    passes = [forward(work, stage, weights[stage], *work.computed) for stage in stages]
    trained = [_seconds(work, stage, each, machine, train=True) for stage, each in zip(stages, passes, strict=True)]
    scored = [_seconds(work, stage, each, machine, train=False) for stage, each in zip(stages, passes, strict=True)]
    count, updates = work.micro_batches, work.learner.updates_per_step
    waiting = bubble(work.grid.pp, work.grid.vpp, count)
    per_update = count * max(trained) / (1 - waiting)
    per_pass = count * updates * max(scored) / (1 - bubble(work.grid.pp, work.grid.vpp, count * updates))
    seconds = updates * per_update + work.passes * per_pass
    micro_batches = count * updates * work.learner.data_parallel_size
    executed = sum(
        _operations(work, stage, each, train=True).total + work.passes * each.total
        for stage, each in zip(stages, passes, strict=True)
    )
    useful = 0.0
    for stage in stages:
        whole = forward(work, stage, weights[stage], work.step_rows, work.expected_length)
        useful += 3 * whole.total - (whole.linear + whole.output if work.adapters else 0.0)
    return Speed(
        model_flops=useful,
        executed_flops=micro_batches * executed,
        seconds=seconds,
        bubble=waiting,
        slowest_stage=max(trained) * len(trained) / sum(trained),
        mfu=useful / (seconds * work.grid.world_size * machine.tflops * 1e12),
        tokens_per_second=work.step_rows * work.expected_length / seconds,
    )


def _share(work: Work, row: Row) -> float:
    """Of all tokens, those that a parameter meets: an expert's, on average, those that choose it."""
    moe = work.model.moe
    return 1.0 if row.expert is None or moe is None else moe.chosen


def _adapter_entries(work: Work, adapter: Adapter) -> float:
    """Of both matrices, on average over tokens; the second meets what the first makes for every source that has an
    adapter.
    """
    inner = sum(source.shape[0] for source in adapter.a.sources)
    outer = inner * sum(source.shape[0] for source in adapter.b.sources)
    return (adapter.a.entries + outer) * _share(work, adapter.base)


def _operations(work: Work, stage: int, once: Forward, *, train: bool) -> Forward:
    """Of one micro-batch: forward and, in training, backward and what is computed again."""
    if not train:
        return once
    linear, attention, adapters = 3.0, 3.0, 3.0
    learner = work.learner
    if learner.recompute_granularity == "selective":
        attention += 1
    elif learner.recompute_granularity == "full":
        share = 1.0
        if learner.recompute_method == "block":
            spans = work.grid.chunks(work.model.layers)[stage]
            again = sum(min(len(span), learner.recompute_num_layers) for span in spans)
            share = again / max(1, sum(len(span) for span in spans))
        linear, attention, adapters = linear + share, attention + share, adapters + share
    output = 4.0 if work.kernel == "fused" else 3.0  # its backward pass multiplies again
    if work.adapters:  # the model's own weights have no gradients
        linear, output = linear - 1, output - 1
    return Forward(
        once.linear * linear,
        once.fp8 * linear,
        once.experts * linear,
        once.attention * attention,
        once.output * output,
        once.adapters * adapters,
    )


def _seconds(work: Work, stage: int, once: Forward, machine: Machine, *, train: bool) -> float:
    """Of one micro-batch through one stage, on all of its ranks at a time."""
    done = _operations(work, stage, once, train=train)
    equivalent = done.total - done.fp8 * (1 - 1 / machine.fp8_speedup)
    equivalent += done.experts * (work.imbalance - 1)  # ranks wait for the one with most tokens
    return equivalent / (work.tp * work.cp * machine.tflops * 1e12 * machine.utilization)
