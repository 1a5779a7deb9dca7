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

    Old log-probs that are there already stay: they are those of the weights that drew the rows.
    """
    if config.objective.kl_coef > 0:
        batch = replace(batch, reference_log_probs=learner.log_probs(batch, reference=True))
    needs_old = config.learner.updates_per_step > 1 and batch.old_log_probs is None
    if not shapes_tokens(config, batch):
        return replace(batch, old_log_probs=learner.log_probs(batch)) if needs_old else batch
    found = learner.statistics(batch)
    if "rlrt" in config.objective.token_shaping:
        found = {**found, "teacher": _teacher(batch, found["log_probs"], learner)}
    shaped = shape_tokens(batch, found, config, step)
    return replace(shaped, old_log_probs=found["log_probs"]) if needs_old else shaped


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
