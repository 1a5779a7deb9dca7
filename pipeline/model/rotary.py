"""Computes a model's rotary frequencies: the same numbers for the learner and the native engine."""

from __future__ import annotations

import math

import torch

from pipeline.model.architecture import Architecture, LinearScaling, Llama3Scaling


def frequencies(model: Architecture) -> torch.Tensor:
    """Float32 ``[head_dim / 2]``, in radians per token, as transformers' ``modeling_rope_utils``.

    Not for latent attention, whose rotary embedding is megatron-core's own.
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    plain, scaling = 1.0 / model.rope_theta**exponents, model.rope_scaling
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if not isinstance(scaling, Llama3Scaling):
        return plain
    lengths = 2 * math.pi / plain  # tokens for one turn
    longest, shortest = scaling.original_positions / scaling.low, scaling.original_positions / scaling.high
    stretched = torch.where(lengths > longest, plain / scaling.factor, plain)
    share = (scaling.original_positions / lengths - scaling.low) / (scaling.high - scaling.low)
    between = (1 - share) * stretched / scaling.factor + share * stretched
    return torch.where((lengths >= shortest) & (lengths <= longest), between, stretched)
