"""How far engine and learner disagree about the same tokens at equal weights.

``d = log pi_learner - log pi_engine`` of every main token, both at T=1, the learner's at the weights that drew the
token; of stale rows nobody has it, so their steps have none of these figures. Equal weights give unequal probabilities
where precision, kernels or parallel layout differ, and every token is then off-policy by ``exp(d)`` (Yao et al. 2025,
"Your efficient RL framework secretly brings you off-policy RL training", fengyao.notion.site).

Everything is a sum over tokens, so micro-batches and ranks add up; a quantile of |d| comes from counts in log-spaced
bins, as in DDSketch (Masson, Rim, Lee 2019, arXiv 1908.10693): bounded relative error, and merging is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

RELATIVE_ERROR = 0.05  # of a quantile between the two limits below
SMALLEST, LARGEST = 1e-6, 100.0  # nats: what is less counts as 0, of what is more only the maximum is known
_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
# Bin i holds _EDGES[i - 1] < |d| <= _EDGES[i].
_EDGES = tuple(SMALLEST * _GROWTH**i for i in range(math.ceil(math.log(LARGEST / SMALLEST) / math.log(_GROWTH)) + 1))

# Names of the counts: |d| up to SMALLEST, the bins between, and above the last edge.
BINS = tuple(f"mismatch_bin_{i:03d}" for i in range(len(_EDGES) + 1))
# The other sums, and the names of their means over tokens.
MEANS = {
    "mismatch_sum": "mismatch_mean",
    "mismatch_kl_sum": "mismatch_kl",
    "mismatch_kl_k1_sum": "mismatch_kl_k1",
}


@torch.no_grad()
def mismatch_sums(log_ratio: torch.Tensor, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """Detached float64 scalars to be added over parts of a batch; of ``mismatch_max`` the maximum.

    KL(pi_engine || pi_learner) is estimated on the engine's own samples (Schulman, joschu.net/blog/kl-approx.html): k1
    = -d is unbiased and may be negative; k3 = exp(d) - 1 - d is unbiased too where the learner gives mass only to what
    the engine can draw, never negative, and far less noisy.

    Args:
        log_ratio: ``[n]``, d; anything where ``main`` is False.
        main: bool ``[n]``, the tokens that count.
    """
    d = torch.where(main, log_ratio.double(), 0.0)
    distance = d.abs()
    # Of NaN the last bin: it sorts behind every edge.
    bins = torch.bucketize(distance, torch.tensor(_EDGES, dtype=torch.float64, device=d.device))
    counts = torch.bincount(bins[main], minlength=len(BINS)).double()
    return {
        "mismatch_sum": distance.sum(),
        "mismatch_max": distance.max() if len(d) else distance.sum(),
        "mismatch_kl_sum": (torch.expm1(d) - d).sum(),
        "mismatch_kl_k1_sum": -d.sum(),
        **dict(zip(BINS, counts.unbind(), strict=True)),
    }


def quantile(counts: Sequence[float], q: float, largest: float) -> float:
    """The smallest |d|, nats, that at least a share ``q`` of the tokens do not exceed; NaN of no tokens.

    Off by at most ``RELATIVE_ERROR`` of itself between ``SMALLEST`` and ``LARGEST``; below, it is 0; above,
    ``largest``.

    Args:
        counts: of ``BINS``, added up over all tokens.
        q: in (0, 1].
        largest: the maximum of |d| over the same tokens.
    """
    need = q * math.fsum(counts)
    if need == 0:
        return math.nan
    index = next(index for index, seen in enumerate(accumulate(counts)) if seen >= need)
    if index == 0:
        return 0.0
    if index == len(_EDGES):
        return largest
    return min(largest, 2 * _EDGES[index] / (1 + _GROWTH))  # equally far, in relative terms, from both edges of the bin
