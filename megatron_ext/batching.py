"""How a step's rows are cut: into mini-batches (optimizer steps), over data-parallel ranks, into micro-batches. Pure functions."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from pipeline.types import TrainBatch

PADDING = -1  # stands for a dummy row in a tensor of row indices


def mini_batches(batch: TrainBatch, count: int) -> list[TrainBatch]:
    """``count`` mini-batches, main rows dealt out in turn and auxiliary rows likewise, so that each has its share of both.

    Weights are left alone: the caller multiplies each mini-batch's loss by ``count``. Then the mean of the mini-batch
    gradients, at equal parameters, is exactly the gradient of the whole batch, however unequal their token counts.
    """
    if count == 1:
        return [batch]
    main, auxiliary = (~batch.auxiliary).nonzero()[:, 0], batch.auxiliary.nonzero()[:, 0]
    if len(main) < count:
        raise ValueError(
            f"learner.updates_per_step={count} needs at least as many main rows; the batch has {len(main)}"
        )
    if batch.old_log_probs is None:
        raise ValueError("learner.updates_per_step > 1 needs old_log_probs: later mini-batches are off-policy")
    return [take(batch, torch.cat([main[i::count], auxiliary[i::count]])) for i in range(count)]


def micro_batches(rows: int, size: int, dp_rank: int, dp_size: int, multiple: int = 1) -> tuple[torch.Tensor, ...]:
    """Row indices of each micro-batch of one data-parallel rank: rows ``dp_rank::dp_size`` in order, then ``PADDING``.

    As many micro-batches of at most ``size`` rows as needed, a ``multiple`` of which the interleaved pipeline schedule asks for,
    all equally long and equally many on every rank; padding is at most one row short of one per micro-batch and rank.
    """
    per_rank = -(-rows // dp_size)
    count = -(-per_rank // size)
    count = -(-count // multiple) * multiple
    each = -(-per_rank // count)
    indices = torch.full((count * each,), PADDING)
    own = torch.arange(rows)[dp_rank::dp_size]
    indices[: len(own)] = own
    return indices.split(each)


def pad(batch: TrainBatch, multiple: int) -> TrainBatch:
    """``batch`` with columns that hold no target at its end, so that ``multiple`` divides the number of its targets' columns."""
    added = -batch.loss_mask.shape[1] % multiple
    if added == 0:
        return batch
    columns = {
        field.name: torch.nn.functional.pad(value, (0, added))
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor) and value.dim() == 2
    }
    return replace(batch, **columns)


def take(batch: TrainBatch, indices: torch.Tensor, device: torch.device | None = None) -> TrainBatch:
    """The rows at ``indices``, on ``device``. ``PADDING`` gives a dummy that no loss or metric sees.

    A dummy is an auxiliary row of weight 0 with one target (a micro-batch without targets would need care everywhere).
    """
    picked = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            picked[field.name] = value[indices.clamp(min=0)].to(device)
    dummy = (indices == PADDING).to(device)
    if dummy.any():
        for name in {"weights", "positive_weights", "advantages"} & picked.keys():
            picked[name][dummy] = 0.0
        picked["auxiliary"][dummy] = True
        picked["correct"][dummy] = False
        one_target = torch.zeros_like(picked["loss_mask"][0])
        one_target[0] = True
        picked["loss_mask"][dummy] = one_target
    return replace(batch, **picked)
