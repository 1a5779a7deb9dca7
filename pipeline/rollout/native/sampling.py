"""Counter-based randomness: the draw of a token depends only on its sample's seed and its index."""

from __future__ import annotations

import torch

# splitmix64 (Steele, Lea, Flood, OOPSLA 2014), constants as signed 64-bit integers; torch's int64 arithmetic wraps.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniforms(seeds: torch.Tensor, count: int, first: torch.Tensor | int = 0) -> torch.Tensor:
    """Uniform numbers strictly inside (0, 1), float64 ``[rows, count]``, from int64 seeds ``[rows]``.

    Column ``t`` is the hash of (seed, first + t), ``first`` int64 ``[rows, 1]``. The seed is mixed first, so that
    neighbouring seeds give unrelated rows.
    """
    counters = (first + torch.arange(1, count + 1, dtype=torch.int64)) * _GOLDEN
    bits = _shift_right(_mix(_mix(seeds)[:, None] + counters), 12)
    return (bits.to(torch.float64) + 0.5) * 2.0**-52


def uniform_top(log_probs: torch.Tensor, top: int, floor: float) -> torch.Tensor:
    """Log-probabilities ``[rows, vocab]`` of CUTS.

    Uniform over the ``top`` likeliest tokens of probability at least ``floor``.

    Rows in which none reaches the floor are left as they are (arXiv 2604.18493, read in a summary).
    """
    likeliest = log_probs.topk(min(top, log_probs.shape[1]), dim=-1)
    allowed = torch.zeros_like(log_probs, dtype=torch.bool)
    allowed.scatter_(1, likeliest.indices, likeliest.values.exp() >= floor)
    uniform = torch.where(allowed, 0.0, -torch.inf) - allowed.sum(-1, keepdim=True).log()
    return torch.where(allowed.any(-1, keepdim=True), uniform, log_probs)


def draw(log_probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draw: int64 ``[rows]`` from log-probabilities ``[rows, vocab]`` and uniforms ``[rows]``.

    The sum runs in float64 so that the tail of a 150k vocabulary is not lost to rounding.
    """
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    threshold = uniform * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    return tokens.clamp_(max=log_probs.shape[1] - 1)


def nucleus(log_probs: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Leave of ``[rows, vocab]`` only the likeliest tokens that make up each row's share ``[rows, 1]``.

    Source: Holtzman et al., 1904.09751, 3.1.

    The token that crosses the share is kept, the others become ``-inf``; not normalised again. Shares of 1 change
    nothing.
    """
    if bool((shares >= 1).all()):
        return log_probs
    ordered, order = log_probs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, (before > shares) & (shares < 1))
    return log_probs.masked_fill(dropped, -torch.inf)
