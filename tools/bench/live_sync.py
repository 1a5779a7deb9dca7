"""Updates live SGLang servers by the plan and by gather and broadcast, in one run (``weight_sync --live``).

Learner ranks are processes that hold the model's parameters as Megatron divides them. Both ways are timed as the
engine's whole update, from pausing the server until it continues. Gather and broadcast is slime's and verl's way: ranks
gather each parameter over TP, the first of them broadcasts whole tensors to the server's ranks by SGLang's own
/update_weights_from_distributed, a bucket at a time.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from pipeline.config.schema import RolloutConfig, SglangConfig
from pipeline.model import architecture
from pipeline.model.folder import Folder
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, rows
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.execute import LearnerShards
from pipeline.reshard.order import Order, PlanInputs
from pipeline.reshard.participant import Participant
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.sglang.engine import SglangEngine
from pipeline.rollout.transport import Deadline
from pipeline.rollout.weight_sync import WeightSync

_BUCKET_BYTES = 64 << 20
_TIMEOUT_S = 300.0
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(folder: Path, learner: Grid, engines: EngineGrid, repeat: int, *, colocated: bool = False) -> dict[str, Any]:
    """Medians over ``repeat`` updates each way, after one that is not counted; bytes as the servers' ranks counted."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = ["--ep-size", str(engines.ep)] if engines.ep > 1 else []
        settings = SglangConfig(max_total_tokens=4096, extra_args=arguments)
        config = RolloutConfig(engine="sglang", tensor_parallel_size=engines.tp, sglang=settings)
        servers = [SglangEngine(config, index=index, log_dir=logs, seed=0) for index in range(engines.count)]
        pool = EnginePool(servers)
        stack.callback(pool.close)
        pool.start(folder)
        stored = architecture.stored_dtype(architecture.read_config(folder))
        dtype = "fp32" if stored == "float32" else "bf16"
        placement = Placement.consecutive(learner.world_size, engines.world_size, colocated)
        inputs = PlanInputs(str(folder), learner, engines, placement, _BUCKET_BYTES, dtype)
        ranks = _Ranks(inputs)
        stack.callback(ranks.close)
        sync = WeightSync(ranks, pool, inputs, _TIMEOUT_S)  # type: ignore[arg-type]  # all that a push needs
        broadcast = _Broadcast(ranks, servers)
        seconds: dict[str, list[float]] = {"plan": [], "gather_broadcast": []}
        for turn in range(repeat + 1):
            for name, update in (("plan", sync.push), ("gather_broadcast", broadcast.push)):
                begun = time.perf_counter()
                update(turn + 1)
                seconds[name].append(time.perf_counter() - begun)
            reports = [report for server in servers for report in server._transport.reports]  # type: ignore[union-attr]
        plan = inputs.plan()
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        return {
            "model_bytes": plan.bounds.full,
            "received_bytes_per_rank": [report.received_bytes for report in reports],
            "minimum_bytes_per_rank": [int(plan.bounds.need[report.process]) for report in reports],
            "gather_broadcast_bytes_per_rank": [plan.bounds.full] * engines.world_size,
            "seconds": round(median["plan"], 4),
            "seconds_within_the_ranks": round(max(report.seconds for report in reports), 4),
            "gather_broadcast_seconds": round(median["gather_broadcast"], 4),
            "seconds_ratio": round(median["plan"] / median["gather_broadcast"], 3),
        }


class _Ranks:
    """The learner's processes, and what ``WeightSync`` asks of them."""

    def __init__(self, inputs: PlanInputs) -> None:
        self.inputs = inputs
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes: list[Connection] = []
        context = mp.get_context("spawn")
        self._processes = []
        for rank in range(inputs.learner.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, inputs, self.store.port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self._processes.append(process)

    def meeting_point(self, *, one_machine: bool) -> tuple[str, int]:
        """See ``pipeline.learner.Learner``."""
        return "127.0.0.1", self.store.port

    def send(self, order: Order) -> None:
        """See ``pipeline.learner.Learner``."""
        self.ask(range(len(self.pipes)), "send", order)

    def ask(self, ranks: Any, method: str, *arguments: Any) -> None:
        """Have some ranks do the same, and wait for all of them."""
        for rank in ranks:
            self.pipes[rank].send((method, arguments))
        for error in [self.pipes[rank].recv() for rank in ranks]:
            if error:
                raise RuntimeError(error)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, inputs: PlanInputs, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    member = _Rank(rank, inputs, port)
    while True:
        method, arguments = pipe.recv()
        try:
            getattr(member, method)(*arguments)
            pipe.send("")
        except (RuntimeError, ValueError) as error:
            pipe.send(f"learner rank {rank}: {error}")


class _Rank:
    """One learner process."""

    def __init__(self, rank: int, inputs: PlanInputs, port: int) -> None:
        self.rank, self.grid = rank, inputs.learner
        self.store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        self.participant = Participant()
        model = architecture.read(Path(inputs.model_path))
        self.rows, folder = rows(model, self.grid), Folder(Path(inputs.model_path), model)
        self.parameters = _parameters(self.rows, self.grid, rank, folder, inputs.dtype)
        world = self.grid.world_size
        dist.init_process_group("gloo", store=PrefixStore("learner", self.store), rank=rank, world_size=world)
        groups = sorted({_holders(row, self.grid) for row in self.rows})
        self.groups = {ranks: dist.new_group(list(ranks)) for ranks in groups}
        self.servers: ProcessGroupGloo | None = None

    def send(self, order: Order) -> None:
        """This rank's part of the plan."""
        self.participant.send(order, self.rank, LearnerShards(self.rows, self.grid, self.rank, self.parameters))

    def join(self, world: int) -> None:
        """Rank 0 of a group with the servers' ranks; the keys are those of SGLang's ``init_custom_process_group``."""
        name = _name(self.rank)
        keys = PrefixStore("cpu/", PrefixStore(f"{name}/", PrefixStore(name, self.store)))
        self.servers = ProcessGroupGloo(keys, 0, world, timeout=timedelta(seconds=_TIMEOUT_S))

    @torch.no_grad()
    def broadcast(self, numbers: list[int]) -> None:
        """Gather the rows of these numbers and, on the first of their ranks, broadcast their whole tensors."""
        works = []
        for row in (self.rows[number] for number in numbers):
            holders = _holders(row, self.grid)
            shard = self.parameters[row.parameter]
            parts = [shard]
            if row.split is not None and len(holders) > 1:
                parts = [torch.empty_like(shard) for _ in holders]
                dist.all_gather(parts, shard, self.groups[holders])
            if self.servers is None or self.rank != holders[0]:
                continue
            for index in range(len(row.sources)):
                cuts = [
                    part.narrow(row.dim, cut.start, cut.length)
                    for at, part in enumerate(parts)
                    for cut in row.slices(len(holders), at)
                    if cut.source == index
                ]
                options = BroadcastOptions()
                options.rootRank, options.rootTensor = 0, 0
                works.append(self.servers.broadcast([torch.cat(cuts, row.dim).contiguous()], options))
        for work in works:
            work.wait()


class _Broadcast:
    """Updates servers by gather and broadcast."""

    def __init__(self, ranks: _Ranks, servers: list[SglangEngine]) -> None:
        self._ranks, self._servers, self._grid = ranks, servers, ranks.inputs.learner
        self._rows = rows(architecture.read(Path(ranks.inputs.model_path)), self._grid)
        self._threads = ThreadPoolExecutor(len(servers) + 1)
        self._joined: set[int] = set()

    def push(self, version: int) -> None:
        """One whole update of every server."""
        for server in self._servers:
            server._running.post("/pause_generation", mode="retract")
            server._transport.session.begin(Deadline(_TIMEOUT_S))  # type: ignore[union-attr]
        for numbers in self._buckets:
            self._bucket(numbers, version)
        for server in self._servers:
            server._transport.session.end(Deadline(_TIMEOUT_S))  # type: ignore[union-attr]
            server._running.post("/continue_generation")

    @cached_property
    def _buckets(self) -> list[list[int]]:
        """Numbers of rows that the same ranks hold, of about as many bytes as the plan's buckets."""
        found: dict[tuple[int, ...], list[list[int]]] = {}
        sizes: dict[tuple[int, ...], int] = {}
        for number, row in enumerate(self._rows):
            if row.exported:
                holders = _holders(row, self._grid)
                size = row.entries * 2
                if holders not in found or sizes[holders] + size > _BUCKET_BYTES:
                    found.setdefault(holders, []).append([])
                    sizes[holders] = 0
                found[holders][-1].append(number)
                sizes[holders] += size
        return [bucket for buckets in found.values() for bucket in buckets]

    def _bucket(self, numbers: list[int], version: int) -> None:
        holders = _holders(self._rows[numbers[0]], self._grid)
        sources = [source for number in numbers for source in self._rows[number].sources]
        if holders[0] not in self._joined:
            self._joined.add(holders[0])
            size = self._servers[0]._config.tensor_parallel_size
            world = 1 + size * len(self._servers)
            self._both(
                [holders[0]],
                ("join", world),
                "/init_weights_update_group",
                [{"rank_offset": 1 + size * number} for number in range(len(self._servers))],
                master_address="127.0.0.1",
                master_port=self._ranks.store.port,
                world_size=world,
                group_name=_name(holders[0]),
                backend="gloo",
            )
        self._both(
            list(holders),
            ("broadcast", numbers),
            "/update_weights_from_distributed",
            [{} for _ in self._servers],
            names=[source.name for source in sources],
            dtypes=[str(_DTYPES[self._ranks.inputs.dtype]).removeprefix("torch.")] * len(sources),
            shapes=[list(source.shape) for source in sources],
            group_name=_name(holders[0]),
            flush_cache=False,
            weight_version=str(version),
        )

    def _both(
        self, ranks: list[int], what: tuple[str, Any], path: str, each: list[dict[str, Any]], **common: Any
    ) -> None:
        """The servers' part and the learner's at the same time."""
        calls = [self._threads.submit(self._ranks.ask, ranks, *what)]
        for server, own in zip(self._servers, each, strict=True):
            calls.append(self._threads.submit(server._running.post, path, timeout_s=_TIMEOUT_S, **common, **own))
        for call in calls:
            call.result()


def _name(rank: int) -> str:
    return f"broadcast-{rank}"


def _holders(row: Row, grid: Grid) -> tuple[int, ...]:
    """The ranks of the first replica that share a row's parameter."""
    return tuple(row.holders(grid, 0))


def _parameters(every: list[Row], grid: Grid, rank: int, folder: Folder, dtype: str) -> dict[str, torch.Tensor]:
    """A rank's part of a Hugging Face folder."""
    found = {}
    for row in every:
        part = row.part(grid, rank)
        if part:
            found[row.parameter] = shard = torch.zeros(row.local_shape(part[0]), dtype=_DTYPES[dtype])
            for cut in row.slices(*part):
                values = folder.read(row.sources[cut.source].name, row.dim, cut.source_start, cut.length)
                shard.narrow(row.dim, cut.start, cut.length).copy_(values)
    return found
