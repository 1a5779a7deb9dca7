"""Decides which node each learner rank and each engine runs on: a pure function of the layout and the nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.reshard.engine_grid import Placement


class PlacementError(ValueError):
    """The processes do not fit; the message says what is short."""


def place(
    world_size: int,
    tensor_parallel: int,
    engines: int,
    engine_gpus: int,
    node_gpus: Sequence[int],
    *,
    colocated: bool = False,
) -> Placement:
    """Place ``world_size`` learner ranks and ``engines`` engines on ``len(node_gpus)`` nodes; node 0 is the driver's.

    With GPUs (``node_gpus``, per node) ranks fill the nodes in order, one GPU each. Engines follow on GPUs of their own
    or, ``colocated``, engine ``i`` shares those of ranks ``i * engine_gpus`` and following. A tensor-parallel group
    stays inside a node unless the group is larger than a node; an engine always stays inside a node. Without GPUs
    tensor-parallel groups are dealt evenly from the first node on, engines from the last; an engine without GPUs is one
    process. Raises ``PlacementError``.
    """
    groups = world_size // tensor_parallel
    if not any(node_gpus):
        nodes = len(node_gpus)
        ranks = [group * nodes // groups if groups >= nodes else group for group in range(groups)]
        homes = [nodes - 1 - engine % nodes for engine in range(engines)]
        return _apart([node for node in ranks for _ in range(tensor_parallel)], homes, 1)
    free = list(node_gpus)
    placed: list[int] = []
    for group in range(groups):
        placed += _group(free, tensor_parallel, max(node_gpus), f"tensor-parallel group {group} of the learner")
    if engine_gpus > max(node_gpus):
        raise PlacementError(
            f"an engine needs {engine_gpus} GPUs, a node has {max(node_gpus)}: "
            "engines of several nodes are not supported"
        )
    if colocated and engine_gpus:
        for engine in range(engines):
            _check_shared(placed, engine_gpus, engine)
        return Placement(world_size, engines * engine_gpus, colocated=True, nodes=tuple(placed))
    hosts = [_group(free, engine_gpus, max(node_gpus), f"engine {i}")[0] if engine_gpus else 0 for i in range(engines)]
    return _apart(placed, hosts, max(1, engine_gpus))


def least_nodes(
    world_size: int, tensor_parallel: int, engines: int, engine_gpus: int, gpus: int, *, colocated: bool = False
) -> int:
    """The smallest number of nodes with ``gpus`` GPUs each that ``place`` is content with; 1 without GPUs.

    Raises ``PlacementError`` where no number of them would do.
    """
    if not gpus:
        return 1
    needed = world_size + (0 if colocated else engines * engine_gpus)  # with one process a node each of them fits
    nodes = math.ceil(needed / gpus)
    while True:
        try:
            place(world_size, tensor_parallel, engines, engine_gpus, [gpus] * nodes, colocated=colocated)
        except PlacementError:
            if nodes >= needed:
                raise
            nodes += 1
        else:
            return nodes


def _apart(learners: Sequence[int], engines: Sequence[int], size: int) -> Placement:
    """Place learner ranks on the nodes ``learners`` and engines of ``size`` processes on the nodes ``engines``.

    No GPU is shared.
    """
    nodes = (*learners, *(node for node in engines for _ in range(size)))
    return Placement(len(learners), len(engines) * size, colocated=False, nodes=nodes)


def _check_shared(ranks: Sequence[int], gpus: int, engine: int) -> None:
    """Refuse an engine that would share the GPUs of ranks on several nodes, or of ranks that do not exist."""
    homes = ranks[engine * gpus : (engine + 1) * gpus]
    if len(homes) < gpus:
        raise PlacementError(
            f"engine {engine} needs the GPUs of {gpus} learner ranks, of {len(ranks)} are left {len(homes)}"
        )
    if len(set(homes)) > 1:
        raise PlacementError(
            f"engine {engine} would share GPUs of the nodes {sorted(set(homes))}; it must fit into one"
        )


def _group(free: list[int], gpus: int, largest: int, who: str) -> list[int]:
    """Take ``gpus`` GPUs for processes that belong together; the node of each."""
    if gpus > largest:
        if gpus % largest:
            raise PlacementError(f"{who} needs {gpus} GPUs, which nodes of {largest} cannot divide evenly")
        whole = [node for node, count in enumerate(free) if count == largest][: gpus // largest]
        if len(whole) * largest < gpus:
            raise PlacementError(f"{who} needs {gpus // largest} whole nodes of {largest} GPUs, {len(whole)} are free")
        for node in whole:
            free[node] = 0
        return [node for node in whole for _ in range(largest)]
    for node, count in enumerate(free):
        if count >= gpus:
            free[node] -= gpus
            return [node] * gpus
    raise PlacementError(f"{who} needs {gpus} GPUs of one node; free are {', '.join(map(str, free))}")
