"""Adds a low-rank adapter to the weight that it is of."""

from __future__ import annotations

import torch


def merge(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """``weight`` ``[out, in]`` plus ``scale`` times ``b`` ``[out, n]`` times ``a`` ``[n, in]``.

    Product and sum are made in float32, and rounded once to ``weight``'s type.
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
