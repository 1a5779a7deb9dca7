"""Compares two ways to export the learner's weights, in the same processes and the same run.

One sends every bucket through rank 0; in the other, balanced owners put the buckets together.

Same processes, one run.

    python -m tools.bench.export           # every layout, a table
    python -m tools.bench.export --json     # the same as JSON

Both put every tensor together as a whole, checksum it and write it once into memory that another process can map (what
Ray's object store costs its owner). Through rank 0: every holder of the first replica sends its parts of a bucket to
rank 0, one bucket after the other. Over gloo; seconds are medians over repeats, of the slowest process. "sent" and
"received" are what the busiest rank sends and receives within the learner; "out" is what leaves the busiest rank for
the engines.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.weights import hf
from pipeline.model.architecture import Architecture
from pipeline.model.checksum import checksum
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, rows
from pipeline.packing import pack
from pipeline.reshard import buckets
from tools.bench import layouts
from tools.bench.weight_sync import DENSE, LAYERS, MOE, _parameters, _timed

REPEATS = 5
BUCKET_MIB = 4
CASES = {
    "TP4": (DENSE, Grid(tp=4)),
    "TP2 PP2": (DENSE, Grid(tp=2, pp=2)),
    "TP2 DP2": (DENSE, Grid(tp=2, dp=2)),
    "PP2 DP2": (DENSE, Grid(pp=2, dp=2)),
    "MoE TP2 DP2 EP4": (MOE, Grid(tp=2, dp=2, ep=4, etp=1)),
    "TP2 PP4": (DENSE, Grid(tp=2, pp=4)),
    "TP4 PP2": (DENSE, Grid(tp=4, pp=2)),
    "TP2 PP2 DP2": (DENSE, Grid(tp=2, pp=2, dp=2)),
}
assert LAYERS == 4  # PP 4 divides it

Moved = dict[str, int]  # "sent", "received", "out": bytes of this rank


def through_rank_0(
    parameters: Mapping[str, torch.Tensor], everything: list[Row], grid: Grid, rank: int
) -> Iterator[Moved]:
    """Bucket by bucket; what it moved."""
    size, bucket = 0, []
    for row in (row for row in everything if row.exported):
        nbytes = 2 * sum(torch.Size(source.shape).numel() for source in row.sources)
        if bucket and (size + nbytes > BUCKET_MIB << 20 or row.holders(grid) != bucket[0].holders(grid)):
            yield _funnel(parameters, bucket, grid, rank)
            size, bucket = 0, []
        bucket.append(row)
        size += nbytes
    yield _funnel(parameters, bucket, grid, rank)


def _funnel(parameters: Mapping[str, torch.Tensor], bucket: list[Row], grid: Grid, rank: int) -> Moved:
    holders = bucket[0].holders(grid)
    moved = {"sent": 0, "received": 0, "out": 0}
    own = None
    if rank in holders:
        alike = rank == holders[0]
        parts = [parameters[row.parameter].reshape(-1) for row in bucket if row.split is not None or alike]
        own = torch.cat(parts) if parts else None
    if rank != 0:
        if own is not None:
            dist.send(own.view(torch.uint8), 0)
            moved["sent"] = own.nbytes
        return moved
    shards, works = {}, []
    for index, holder in enumerate(holders):
        shapes = [row.local_shape(len(holders)) for row in bucket if row.split is not None or index == 0]
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        shards[holder] = own if holder == 0 else torch.empty(numel, dtype=torch.bfloat16)
        if holder != 0 and numel:
            works.append(dist.irecv(shards[holder].view(torch.uint8), holder))
            moved["received"] += shards[holder].nbytes
    for work in works:
        work.wait()
    moved["out"] = _leave(_assembled(bucket, holders, shards))
    return moved


def _assembled(bucket: list[Row], holders: tuple[int, ...], shards: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {s.name: torch.empty(s.shape, dtype=torch.bfloat16) for row in bucket for s in row.sources}
    for index, holder in enumerate(holders):
        start = 0
        for row in (row for row in bucket if row.split is not None or index == 0):
            shape = torch.Size(row.local_shape(len(holders)))
            values = shards[holder][start : start + shape.numel()].view(shape)
            start += shape.numel()
            for cut in row.slices(len(holders), index):
                target = tensors[row.sources[cut.source].name].narrow(row.dim, cut.source_start, cut.length)
                target.copy_(values.narrow(row.dim, cut.start, cut.length))
    return tensors


def _leave(tensors: Mapping[str, torch.Tensor]) -> int:
    checksum(tensors)
    return pack(tensors)[1].nbytes


def balanced(parameters: Mapping[str, torch.Tensor], rounds: buckets.Rounds, topology: Any) -> Iterator[Moved]:
    """Round by round; what it moved."""
    for line, bucket in zip(rounds, hf.export(parameters, rounds, topology, 0), strict=True):
        moved = {"sent": 0, "received": 0, "out": 0}
        for planned in line:
            sizes = {rank: sum(p.nbytes for p in hf._parts(planned, rank, torch.bfloat16)) for rank in planned.holders}
            if planned.owner == topology.rank:
                moved["received"] += sum(size for rank, size in sizes.items() if rank != planned.owner)
            elif topology.rank in planned.holders:
                moved["sent"] += sizes[topology.rank]
        if bucket is not None:
            moved["out"] = pack(bucket.tensors)[1].nbytes  # the export has made the checksum
        yield moved


def measure(rank: int, case: tuple[Architecture, Grid], world: int, port: int, out: Any) -> None:
    """Both ways in turn; rank 0 reports."""
    torch.set_num_threads(1)
    model, grid = case
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    everything, parameters = rows(model, grid), _parameters(model, grid, rank)
    rounds = buckets.plan(everything, grid, 2, BUCKET_MIB)
    topology = SimpleNamespace(rank=rank, grid=grid, device=torch.device("cpu"), backend="gloo")
    ways: dict[str, Callable[[], Iterator[Moved]]] = {
        "rank_0": lambda: through_rank_0(parameters, everything, grid, rank),
        "balanced": lambda: balanced(parameters, rounds, topology),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    moved: dict[str, list[Moved]] = {}
    for _ in range(REPEATS + 1):
        for name, way in ways.items():
            seconds[name].append(_timed(lambda name=name, way=way: moved.update({name: list(way())})))
    totals = {name: {key: sum(item[key] for item in items) for key in items[0]} for name, items in moved.items()}
    every: list[Any] = [None] * grid.world_size
    dist.all_gather_object(every, totals)
    if rank == 0:
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        result: dict[str, Any] = {
            "processes": grid.world_size,
            "weights_mb": round(sum(buckets.owned(rounds, grid.world_size)) / 1e6),
        }
        for name in ways:
            result[f"{name}_s"] = round(median[name], 3)
            for key in ("sent", "received", "out"):
                result[f"{name}_{key}_mb"] = round(max(entry[name][key] for entry in every) / 1e6, 1)
        result["seconds_ratio"] = round(median["balanced"] / median["rank_0"], 2)
        out.put(result)
    dist.destroy_process_group()


def bench(name: str) -> dict[str, Any]:
    """One layout."""
    return layouts.run(name, CASES[name][1].world_size, measure, CASES[name])


def main() -> None:
    """Every case, then print."""
    layouts.main(__doc__, CASES, bench)


if __name__ == "__main__":
    main()
