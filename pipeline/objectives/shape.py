"""Advantages and weights of single tokens, from statistics of the whole step: ``objective.token_shaping`` lists files
of ``shaping``.

They are computed once a step, before the batch is cut into mini-batches, micro-batches or shares of ranks, from a
forward pass at the weights of the first update: means, quantiles and ranks are those of all main tokens, whatever the
layout. A shaping is given the tokens as the one before left them; what a loss needs to know of single tokens (its
``mark``) is worked out last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from pipeline.config.schema import RunConfig
from pipeline.objectives.shaping.clip_cov import detach_top
from pipeline.objectives.shaping.stare import amplify
from pipeline.objectives.tokens import Tokens
from pipeline.registry import load
from pipeline.types import TrainBatch

Shaping = Callable[[Tokens, RunConfig, int], Tokens]
# Actuators with ``statistics``: what they do to the tokens at a command.
ACTUATORS: dict[str, Callable[[Tokens, float], Tokens]] = {"clip_cov": detach_top, "stare": amplify}


def shapes_tokens(config: RunConfig, batch: TrainBatch) -> bool:
    """Whether ``batch`` must go through ``shape_tokens``."""
    return bool(config.objective.token_shaping) or _marker(config) is not None or _acts(batch)


def shape_tokens(batch: TrainBatch, found: Mapping[str, torch.Tensor], config: RunConfig, step: int) -> TrainBatch:
    """``batch`` with the advantages, weights and marks of its tokens; what no method touches stays ``None``.

    Args:
        batch: of the whole step, with ``groups``.
        found: ``log_probs``, ``entropy`` and ``moment`` of the policy before the update, as ``Learner.statistics``
            gives them; with shaping ``rlrt`` also ``teacher``.
        config: which methods, with which parameters.
        step: the update, for schedules and seeds.
    """
    before = Tokens.of(batch, found)
    tokens = before
    for name in config.objective.token_shaping:
        tokens = load("pipeline.objectives.shaping", name).shape(tokens, config, step)
    mark = _marker(config)
    if mark is not None:
        tokens = mark(tokens, config, step)
    if _acts(batch):
        tokens = ACTUATORS[batch.actuation.kind](tokens, batch.actuation.command)
    row = batch.row_of_target
    main = ~batch.auxiliary[row]
    changed: dict[str, Any] = {}
    if tokens.advantages is not before.advantages:
        changed["token_advantages"] = _filled(batch.advantages[row], tokens.advantages.float(), main)
    if tokens.scale is not before.scale:
        given = torch.ones(main.shape) if batch.token_weights is None else batch.token_weights
        changed["token_weights"] = given * _filled(torch.ones(main.shape), tokens.scale.float(), main)
    if tokens.marks is not None:
        changed["marks"] = _filled(torch.zeros(main.shape, dtype=torch.uint8), tokens.marks, main)
    return replace(batch, **changed)


def _marker(config: RunConfig) -> Shaping | None:
    """How the configured loss marks single tokens; ``None``: it does not."""
    return getattr(load("pipeline.objectives.losses", config.objective.loss), "mark", None)


def _acts(batch: TrainBatch) -> bool:
    """Whether the actuator is one of ``ACTUATORS``, and not at rest."""
    return batch.actuation.kind in ACTUATORS and batch.actuation.command > 0


def _filled(base: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    base[mask] = values
    return base
