"""Adds to a batch what takes a forward pass of its own, before the step's first update."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.config.schema import RunConfig
from pipeline.learner import Learner
from pipeline.objectives.shape import shape_tokens, shapes_tokens
from pipeline.objectives.shaping import rlrt
from pipeline.types import TrainBatch


def prepare(batch: TrainBatch, learner: Learner, config: RunConfig, step: int) -> TrainBatch:
    """Add reference log-probs, old log-probs, and what ``shaping`` makes of tokens; each only where something reads it.

    Old log-probs of stale rows are the engines', of the weights that drew each token (``objective.old_log_probs``:
    the learner's, of the weights that the update starts from, as those of fresh rows are).
    """
    if config.objective.kl_coef > 0:
        batch = replace(batch, reference_log_probs=learner.log_probs(batch, reference=True))
    if batch.staleness and config.objective.old_log_probs == "engine":
        batch = replace(batch, old_log_probs=_drawn_with(batch, learner))
    needs_old = config.learner.updates_per_step > 1 and batch.old_log_probs is None
    if not shapes_tokens(config, batch):
        return replace(batch, old_log_probs=learner.log_probs(batch)) if needs_old else batch
    found = learner.statistics(batch)
    if "rlrt" in config.objective.token_shaping:
        found = {**found, "teacher": _teacher(batch, found["log_probs"], learner)}
    shaped = shape_tokens(batch, found, config, step)
    return replace(shaped, old_log_probs=found["log_probs"]) if needs_old else shaped


def _drawn_with(batch: TrainBatch, learner: Learner) -> torch.Tensor:
    """Log-probs ``[targets]`` at T=1 when they were drawn; of rows at another temperature, which engines do not know
    at 1, the learner's as it is.
    """
    at_one = batch.temperatures == 1
    if at_one.all():
        return batch.behavior_log_probs
    others = ~at_one
    old = batch.behavior_log_probs.clone()
    old[others[batch.row_of_target]] = learner.log_probs(batch.take(others.nonzero().squeeze(1)))
    return old


def _teacher(batch: TrainBatch, student: torch.Tensor, learner: Learner) -> torch.Tensor:
    """Log-probs ``[targets]``, of every token as the teacher of ``rlrt`` sees it.

    Rows that the teacher is not shown keep the student's own.
    """
    shown = rlrt.teacher_batch(batch)
    if shown is None:
        return student
    rows, of = shown
    taught = student.clone()
    asked = torch.zeros(batch.rows, dtype=torch.bool).index_fill(0, of, True)
    taught[asked[batch.row_of_target]] = learner.log_probs(rows)
    return taught
