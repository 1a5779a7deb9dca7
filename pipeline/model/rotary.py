"""Computes a model's rotary frequencies: the same numbers for the learner and the native engine."""

from __future__ import annotations

import math

import torch

from pipeline.model.architecture import Architecture
from pipeline.model.rope import LinearScaling, Llama3Scaling, LongRope, Yarn


def frequencies(model: Architecture) -> torch.Tensor:
    """Float32 ``[rotary_dim / 2]``, in radians per token, as transformers' ``modeling_rope_utils``.

    Not for latent attention, whose rotary embedding is megatron-core's own.
    """
    exponents = torch.arange(0, model.rotary_dim, 2, dtype=torch.float32) / model.rotary_dim
    plain, scaling = 1.0 / model.rope_theta**exponents, model.rope_scaling
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    if isinstance(scaling, Yarn):
        return _yarn(plain, scaling, model.rope_theta)
    if isinstance(scaling, LongRope):
        return plain / torch.tensor(scaling.short)
    return plain


def attention_factor(model: Architecture) -> float:
    """What sine and cosine are multiplied by: 1 but for YaRN and LongRoPE."""
    scaling = model.rope_scaling
    return scaling.attention_factor if isinstance(scaling, (Yarn, LongRope)) else 1.0


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    lengths = 2 * math.pi / plain  # tokens for one turn
    longest, shortest = scaling.original_positions / scaling.low, scaling.original_positions / scaling.high
    stretched = torch.where(lengths > longest, plain / scaling.factor, plain)
    share = (scaling.original_positions / lengths - scaling.low) / (scaling.high - scaling.low)
    between = (1 - share) * stretched / scaling.factor + share * stretched
    return torch.where((lengths >= shortest) & (lengths <= longest), between, stretched)


def _yarn(plain: torch.Tensor, scaling: Yarn, theta: float) -> torch.Tensor:
    """Frequencies that turn less than ``beta_slow`` times are divided, those of more than ``beta_fast`` turns kept."""
    dim = 2 * len(plain)

    def at(turns: float) -> float:
        """Index of the entry that turns so often over the original positions."""
        return dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = at(scaling.beta_fast), at(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept
