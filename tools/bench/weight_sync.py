"""Compares weight sync by plan with the gather and broadcast of slime and verl, in bytes and seconds.

Same processes, same weights, one run.

    python -m tools.bench.weight_sync           # every layout, a table
    python -m tools.bench.weight_sync --json     # the same as JSON
    python -m tools.bench.weight_sync --live --learner tp=2,pp=1,dp=1 --engines tp=2,count=1 --json FILE
                                                 # real SGLang servers (``live_sync``); --model DIR or --megabytes N

Gather and broadcast, per parameter: colocated, PP (and EP) broadcast of the shard to every stage, TP all-gather on
every rank, then each engine rank slices (slime's update_weight_from_tensor, verl with megatron-bridge's export).
Disaggregated, TP all-gather (after an EP broadcast), then one rank of each stage broadcasts the whole tensor to every
engine rank, which slices (slime's update_weight_from_distributed, verl's). Both are written here as those collectives,
all of a bucket in flight at once, over gloo. Seconds are medians over repeats, of the slowest process; "bytes" is what
the busiest engine rank receives. Both ways must end bitwise equal.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from pipeline.model.architecture import FAMILIES, Architecture, Moe
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, rows
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.execute import EngineShards, LearnerShards, Mover
from pipeline.reshard.link import Group
from pipeline.reshard.order import Order, PlanInputs
from pipeline.reshard.plan import make_plan
from tools.bench import layouts

REPEATS = 5
BUCKET_BYTES = 64 << 20
LAYERS = 4
DENSE = Architecture(
    FAMILIES["Qwen3ForCausalLM"], LAYERS, 1024, 3072, 16, 8, 64, 16000, 1024, 1e-6, 1e4, None, tied=False, qk_norm=True
)
MOE = Architecture(
    FAMILIES["Qwen3MoeForCausalLM"], LAYERS, 768, 768, 16, 8, 64, 16000, 1024, 1e-6, 1e4, None, tied=False,
    moe=Moe((True,) * LAYERS, 8, 768, 2), qk_norm=True,
)  # fmt: skip
CASES = {
    "colocated TP4 -> 1 x TP4": (DENSE, Grid(tp=4), EngineGrid(4), True),
    "colocated TP2 PP2 -> 1 x TP4": (DENSE, Grid(tp=2, pp=2), EngineGrid(4), True),
    "colocated TP2 PP2 -> 2 x TP2": (DENSE, Grid(tp=2, pp=2), EngineGrid(2, count=2), True),
    "colocated MoE TP2 DP2 EP4 -> 1 x TP4 EP4": (MOE, Grid(tp=2, dp=2, ep=4, etp=1), EngineGrid(4, 4), True),
    "apart 2+2 TP2 -> 1 x TP2": (DENSE, Grid(tp=2), EngineGrid(2), False),
    "colocated TP2 PP4 -> 2 x TP4": (DENSE, Grid(tp=2, pp=4), EngineGrid(4, count=2), True),
    "colocated TP4 PP2 -> 1 x TP8": (DENSE, Grid(tp=4, pp=2), EngineGrid(8), True),
    "apart 4+4 TP2 PP2 -> 1 x TP4": (DENSE, Grid(tp=2, pp=2), EngineGrid(4), False),
    "apart 4+4 TP2 PP2 -> 2 x TP2": (DENSE, Grid(tp=2, pp=2), EngineGrid(2, count=2), False),
}


class GatherBroadcast:
    """The peers' way. Every process of the world must construct it, and then call it, together."""

    def __init__(
        self, model: Architecture, learner: Grid, engines: EngineGrid, placement: Placement, rank: int
    ) -> None:
        self.learner, self.engines, self.placement, self.rank = learner, engines, placement, rank
        self.experts = model.moe.experts if model.moe else 0
        self.rows = [row for row in rows(model, learner) if row.exported]
        self.place = learner.place(rank) if rank < learner.world_size else None
        self.number = rank if placement.colocated else rank - learner.world_size
        self.groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for row in self.rows:
            for ranks in self._all_groups(row):
                if ranks not in self.groups:  # new_group is collective: the same order everywhere
                    self.groups[ranks] = dist.new_group(list(ranks))
        self.received = 0

    def _all_groups(self, row: Row) -> list[tuple[int, ...]]:
        learners = range(self.learner.world_size)
        found = {self._spread(row, rank) for rank in learners} | {self._shards(row, rank) for rank in learners}
        return sorted(found | {self._engine_group(row)})

    def _spread(self, row: Row, rank: int) -> tuple[int, ...]:
        """Ranks of ``rank``'s coordinates that differ from it in stage and, for experts, in expert group.

        Apart: its own stage.
        """
        grid, place = self.learner, self.learner.place(rank)
        stages = range(grid.pp) if self.placement.colocated else [place.pp]
        if row.expert is None:
            return tuple(grid.dense_rank(place.tp, place.dp, stage) for stage in stages)
        return tuple(grid.expert_rank(place.etp, ep, place.edp, stage) for stage in stages for ep in range(grid.ep))

    def _shards(self, row: Row, rank: int) -> tuple[int, ...]:
        """Ranks that share one copy of the parameter with ``rank``."""
        grid, place = self.learner, self.learner.place(rank)
        if row.expert is None:
            return tuple(grid.dense_rank(tp, place.dp, place.pp) for tp in range(grid.tp))
        return tuple(grid.expert_rank(etp, place.ep, place.edp, place.pp) for etp in range(grid.expert_tp))

    def _engine_group(self, row: Row) -> tuple[int, ...]:
        first = self.learner.dense_rank(0, 0, row.stage)
        engines = (self.placement.engine_process(number) for number in range(self.placement.engines))
        return (0,) if self.placement.colocated else (first, *engines)

    def run(self, parameters: dict[str, torch.Tensor], shards: EngineShards) -> None:
        """One sync."""
        self.received = size = 0
        bucket: list[Row] = []
        for row in self.rows:
            size += 2 * row.entries
            bucket.append(row)
            if size > BUCKET_BYTES:
                self._bucket(bucket, parameters, shards)
                bucket, size = [], 0
        self._bucket(bucket, parameters, shards)

    def _bucket(self, bucket: list[Row], parameters: dict[str, torch.Tensor], shards: EngineShards) -> None:
        full = self._gather(bucket, parameters) if self.place else {}
        if not self.placement.colocated:
            full = self._broadcast(bucket, full)
        for row in bucket if shards.shards else ():
            for index, source in enumerate(row.sources):
                span = self.engines.interval(row, index, self.experts, self.number % self.engines.tp)
                if span:
                    part = full[source.name].narrow(row.dim, span.start, len(span))
                    shards.shards[source.name][1].copy_(part)

    def _gather(self, bucket: list[Row], parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """PP and EP broadcasts, TP all-gathers, whole Hugging Face tensors."""
        works, local = [], {}
        for row in bucket:
            if not self.placement.colocated and row.stage != self.place.pp:
                continue
            parts = self.learner.tp if row.expert is None else self.learner.expert_tp
            shard = parameters.get(row.parameter)
            local[row.parameter] = shard = (
                torch.empty(row.local_shape(parts), dtype=torch.bfloat16) if shard is None else shard
            )
            group = self._spread(row, self.rank)
            owner = next(rank for rank in group if row.part(self.learner, rank))
            if len(group) > 1:
                self.received += shard.nbytes * (owner != self.rank)
                works.append(dist.broadcast(shard.view(torch.uint8), owner, self.groups[group], async_op=True))
        _wait(works)
        works, gathered = [], {}
        for row in bucket:
            if row.parameter in local:
                shard, group = local[row.parameter], self._shards(row, self.rank)
                gathered[row.parameter] = [shard]
                if row.split is not None and len(group) > 1:
                    gathered[row.parameter] = [torch.empty_like(shard) for _ in group]
                    self.received += shard.nbytes * (len(group) - 1)
                    outputs = [part.view(torch.uint8) for part in gathered[row.parameter]]
                    works.append(dist.all_gather(outputs, shard.view(torch.uint8), self.groups[group], async_op=True))
        _wait(works)
        full: dict[str, torch.Tensor] = {}
        for row in bucket:
            parts = gathered.get(row.parameter, ())
            pieces: dict[int, list[torch.Tensor]] = {}
            for number, part in enumerate(parts):
                for cut in row.slices(len(parts), number):
                    pieces.setdefault(cut.source, []).append(part.narrow(row.dim, cut.start, cut.length))
            full |= {row.sources[index].name: torch.cat(found, row.dim) for index, found in pieces.items()}
        return full

    def _broadcast(self, bucket: list[Row], full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors from one rank of the stage to every engine rank."""
        works, kept = [], {}
        for row in bucket:
            group = self._engine_group(row)
            for source in row.sources if self.rank in group else ():
                if self.rank != group[0]:
                    full[source.name] = torch.empty(source.shape, dtype=torch.bfloat16)
                    self.received += full[source.name].nbytes
                kept[source.name] = full[source.name]
                works.append(
                    dist.broadcast(kept[source.name].view(torch.uint8), group[0], self.groups[group], async_op=True)
                )
        _wait(works)
        return kept


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _parameters(model: Architecture, learner: Grid, rank: int) -> dict[str, torch.Tensor]:
    """A rank's shards, random, equal on all replicas."""
    found = {}
    for number, row in enumerate(rows(model, learner)):
        part = row.part(learner, rank)
        if part:
            generator = torch.Generator().manual_seed(1000 * number + (part[1] if row.split is not None else 0))
            found[row.parameter] = torch.randn(row.local_shape(part[0]), generator=generator).to(torch.bfloat16)
    return found


def measure(rank: int, case: tuple[Architecture, Grid, EngineGrid, bool], world: int, port: int, out: Any) -> None:
    """Run both ways in turn; rank 0 reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, learner, engines, colocated = case
    placement = Placement.consecutive(learner.world_size, engines.world_size, colocated, 8)
    parameters = _parameters(model, learner, rank) if rank < learner.world_size else {}
    held = LearnerShards(rows(model, learner), learner, rank, parameters) if parameters else EngineShards({})
    plan = make_plan(model, learner, engines, placement, BUCKET_BYTES)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    address = [("127.0.0.1", store.port if store else 0)]
    dist.broadcast_object_list(address)
    inputs = PlanInputs("", learner, engines, placement, BUCKET_BYTES, "bf16")
    order = Order(0, 0, inputs, "", address[0], 0, 60.0)
    group = Group(TCPStore(*address[0], is_master=False), order, "weights", rank, world)
    mover = Mover.of(plan, rank)
    shards = [EngineShards.empty(plan, rank) for _ in range(2)]
    peers = GatherBroadcast(model, learner, engines, placement, rank)
    seconds: dict[str, list[float]] = {"plan": [], "gather_broadcast": []}
    for _ in range(REPEATS + 1):
        seconds["plan"].append(_timed(lambda: mover.move(held, shards[0], group)))
        seconds["gather_broadcast"].append(_timed(lambda: peers.run(parameters, shards[1])))
    same = all(torch.equal(part, shards[1].shards[name][1]) for name, (_, part) in shards[0].shards.items())
    received = int(plan.traffic()[1:, 1].sum((0, 1))[rank])
    every: list[Any] = [None] * world
    dist.all_gather_object(every, (same, received, peers.received, int(plan.bounds.ingress[rank])))
    if rank == 0:
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        ours, theirs, least = (max(column) for column in list(zip(*every, strict=True))[1:])
        out.put(
            {
                "processes": world,
                "weights_mb": round(plan.bounds.full / 1e6),
                "bitwise_equal": all(entry[0] for entry in every),
                "minimum_bytes": least,
                "plan_bytes": ours,
                "gather_broadcast_bytes": theirs,
                "plan_to_minimum": round(ours / least, 3) if least else None,
                "gather_broadcast_to_minimum": round(theirs / least, 3) if least else None,
                "plan_seconds": round(median["plan"], 4),
                "gather_broadcast_seconds": round(median["gather_broadcast"], 4),
                "seconds_ratio": round(median["plan"] / median["gather_broadcast"], 3),
            }
        )
    dist.destroy_process_group()


def _timed(work: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def bench(name: str) -> dict[str, Any]:
    """One layout."""
    _, learner, engines, colocated = CASES[name]
    return layouts.run(name, learner.world_size + (0 if colocated else engines.world_size), measure, CASES[name])


def main() -> None:
    """Every case, then print; or one pair of layouts with live servers."""
    parser = layouts.parser(__doc__)
    live = parser.add_argument_group("real servers")
    live.add_argument("--live", action="store_true", help="update real SGLang servers; the options below are for this")
    live.add_argument("--learner", default="tp=2,pp=1,dp=1", help="tp, pp, dp, ep, etp (default: %(default)s)")
    live.add_argument("--engines", default="tp=2,count=1", help="tp, ep, count (default: %(default)s)")
    live.add_argument("--colocated", action="store_true", help="engine rank i shares the process of learner rank i")
    live.add_argument("--model", type=Path, help="a Hugging Face folder")
    live.add_argument("--megabytes", type=int, default=176, help="without --model: of a random Llama, at least 176")
    live.add_argument("--repeat", type=int, default=REPEATS, help="updates that count (default: %(default)s)")
    given = parser.parse_args()
    if not given.live:
        layouts.main(parser, CASES, bench)
        return
    from tools.bench import live_sync
    from tools.bench.conversion import synthetic

    with tempfile.TemporaryDirectory() as root:
        folder = given.model or synthetic(Path(root) / "model", given.megabytes)
        if not given.model:
            (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
        sides = Grid(**_sizes(given.learner)), EngineGrid(**_sizes(given.engines))
        result = live_sync.run(folder, *sides, given.repeat, colocated=given.colocated)
    layouts.show({"learner": given.learner, "engines": given.engines, **result}, given.json or "-")


def _sizes(text: str) -> dict[str, int]:
    """``tp=2,pp=1`` as a dictionary."""
    return {name: int(number) for name, _, number in (word.partition("=") for word in text.split(","))}


if __name__ == "__main__":
    main()
