"""The cost of a ``Plan`` as numbers and a picture, beside other ways to move the same weights.

The others are the least that any plan could move, and gather and broadcast of whole tensors.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.reshard.pieces import FANOUT, INTER, LOCAL, NEAR
from pipeline.reshard.plan import Plan
from pipeline.units import GIB


def summary(plan: Plan, inter_gbps: float, intra_gbps: float) -> dict[str, Any]:
    """Bytes, ratios and predicted seconds of a plan, ready for JSON.

    ``inter_gbps``, ``intra_gbps``: 10^9 bytes a second that one GPU sends, and at the same time receives, over the
    network and within its node. Single numbers are those of the busiest rank or node; ratios are ``None`` where nothing
    has to move. ``gather_broadcast``: what ranks receive where every parameter is gathered over TP and broadcast to all
    engine ranks, as slime and verl do.
    """
    traffic, bounds = plan.traffic(), plan.bounds
    engines = [plan.placement.engine_process(rank) for rank in range(plan.placement.engines)]
    by_process = traffic[:, 1].sum(1)
    ingress = by_process[[NEAR, INTER, FANOUT]].sum(0)[engines]
    nodes = np.array(plan.placement.nodes)
    entered = np.bincount(nodes, weights=by_process[INTER], minlength=len(bounds.node_ingress)).astype(np.int64)
    sent = traffic[[NEAR, INTER, FANOUT], 0].sum((0, 1))
    first_sent = traffic[[NEAR, INTER], 0].sum((0, 1))[: plan.placement.learners]
    full = bounds.full_ingress[engines]
    return {
        "model_bytes": bounds.full,
        "per_rank_ingress_bytes": _most(ingress),
        "per_rank_minimum_bytes": _most(bounds.ingress),
        "per_rank_ingress_ratio": _ratio(ingress, bounds.ingress),
        "inter_node_ingress_bytes": _most(entered),
        "inter_node_lower_bound_bytes": _most(bounds.node_ingress),
        "inter_node_ratio": _ratio(entered, bounds.node_ingress),
        "gather_broadcast_per_rank_ingress_bytes": _most(full),
        "gather_broadcast_ratio": _ratio(full, bounds.ingress),
        "gather_broadcast_inter_node_bytes": _most(bounds.full_node_ingress),
        "bucket_bytes": plan.bucket_bytes,
        "buckets": plan.buckets,
        "peak_buffer_bytes": max(_most(traffic[[NEAR, INTER]].sum((0, 1))), _most(traffic[FANOUT].sum(0))),
        "total_sent_bytes": int(sent.sum()),
        "total_local_copy_bytes": int(by_process[LOCAL].sum()),
        "learner_sent_max_over_mean": _most(first_sent) / first_sent.mean() if first_sent.any() else None,
        "tasks": sum(len(block.turns) * len(block.pieces.kind) for block in plan.blocks),
        "tensors": len(plan.tensors),
        "quantise": dict(Counter(tensor.quantise or "not" for tensor in plan.tensors)),
        "inter_gbps": inter_gbps,
        "intra_gbps": intra_gbps,
        "predicted_seconds": predicted_seconds(traffic, inter_gbps, intra_gbps),
        "ingress_bytes_by_engine_rank": ingress.tolist(),
        "minimum_bytes_by_engine_rank": bounds.ingress[engines].tolist(),
        "need_bytes_by_engine_rank": bounds.need[engines].tolist(),
        "gather_broadcast_bytes_by_engine_rank": full.tolist(),
        "inter_node_ingress_bytes_by_node": entered.tolist(),
        "inter_node_lower_bound_bytes_by_node": bounds.node_ingress.tolist(),
        "sent_bytes_by_process": sent.tolist(),
    }


def predicted_seconds(traffic: np.ndarray, inter_gbps: float, intra_gbps: float) -> float:
    """Buckets one after the other, in each the two stages; a stage lasts as long as its busiest link.

    Latencies, packing and contention in the network are left out. ``traffic``: ``Plan.traffic``.
    """
    links = traffic.max(axis=(1, 3)) / 1e9  # the busier direction of the busiest process: [kind, bucket]
    entering = np.maximum(links[INTER] / inter_gbps, links[NEAR] / intra_gbps)
    return float((entering + links[FANOUT] / intra_gbps).sum())


def draw(result: dict[str, Any], title: str, path: Path) -> None:
    """A picture of ``summary``: GiB into every engine rank and into every node; least, plan, whole tensors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (ranks, nodes) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1), layout="constrained")
    series = (
        (ranks, "gather_broadcast_bytes_by_engine_rank", "gather and broadcast", "#c9cdd2", 0.85),
        (ranks, "ingress_bytes_by_engine_rank", "plan", "#2f6db3", 0.85),
        (ranks, "minimum_bytes_by_engine_rank", "least possible", "#e07b39", 0.35),
        (nodes, "inter_node_ingress_bytes_by_node", "plan", "#2f6db3", 0.85),
        (nodes, "inter_node_lower_bound_bytes_by_node", "least possible", "#e07b39", 0.35),
    )
    for axes, key, label, colour, width in series:
        values = np.array(result[key]) / GIB
        axes.bar(np.arange(len(values)), values, width, label=label, color=colour)
    ranks.set(xlabel="engine rank", ylabel="GiB received", title="into every engine rank")
    nodes.set(xlabel="node", ylabel="GiB received", title="into every node, from others")
    for axes in (ranks, nodes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*ranks.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _most(values: np.ndarray) -> int:
    return int(values.max())


def _ratio(values: np.ndarray, bound: np.ndarray) -> float | None:
    """Of the busiest rank or node to the busiest in the bound."""
    return float(values.max() / bound.max()) if bound.max() else None
