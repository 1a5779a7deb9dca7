"""What every process of ``test_execute.py`` runs; results are compared there."""

from contextlib import closing

import torch
from torch.distributed import TCPStore

from pipeline.model import fp8, fp8_layout
from pipeline.model.layout import rows
from pipeline.reshard.execute import DTYPES, EngineShards, LearnerShards, Mover, QuantisedShards
from pipeline.reshard.link import Group
from pipeline.reshard.order import Order, PlanInputs
from pipeline.reshard.plan import make_plan
from tests.plan_source import local_parameters


def full_tensors(model, dtype):
    """The model's Hugging Face tensors, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    sources = {source.name: source.shape for row in rows(model) for source in row.sources}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in sources.items()}


_STORES = []  # they stay until all processes are through


def move(rank, world, address, case, bucket_bytes, dtype):
    """Execute the plan of ``case``; names of engine tensors that are not bitwise as gathered and sliced, what moved,
    the plan's figures.
    """
    model, learner, engines, placement = case
    plan = make_plan(model, learner, engines, placement, bucket_bytes, dtype, smallest_share=64)
    full = full_tensors(model, DTYPES[4 if dtype == "fp32" else 2])
    reader = engine = EngineShards({})
    if rank < learner.world_size:
        held = LearnerShards(rows(model, learner), learner, rank, local_parameters(model, learner, rank, full))
        reader = QuantisedShards(held, keep_bytes=1 << 15) if dtype == "fp8" else held
    if rank in {placement.engine_process(number) for number in range(engines.world_size)}:
        engine = EngineShards.empty(plan, rank)
    if rank == 0:
        _STORES.append(TCPStore(*address, is_master=True, wait_for_workers=False))
    order = Order(0, 0, PlanInputs("", learner, engines, placement, bucket_bytes, dtype), "", address, 0, 60.0)
    store = TCPStore(*address, is_master=False)
    with closing(Group(store, order, "weights", rank, world)) as group:
        moved = Mover.of(plan, rank).move(reader, engine, group)
    for tensor in plan.tensors:
        if tensor.quantise == "before" and tensor.item_size == 1:
            full[tensor.name], full[fp8_layout.scale_name(tensor.name)] = fp8.quantise(full[tensor.name])
    wrong = wrong_shards(plan, rank, engine, full)
    traffic = plan.traffic()[:, :, :, rank]
    peak = max(traffic[1:3].sum((0, 1)).max(), traffic[3].sum(0).max())
    return wrong, moved, int(plan.bounds.ingress[rank]), int(traffic[1:, 0].sum()), int(peak), plan.buckets


def wrong_shards(plan, rank, engine, full):
    """Compare with slices of whole tensors that the engines' own rule asks for."""
    wrong = []
    expected = set()
    scales = {tensor.name for tensor in plan.tensors if tensor.quantise == "before" and tensor.item_size == 4}
    experts = plan.model.moe.experts if plan.model.moe else 0
    numbers = [n for n in range(plan.engines.world_size) if plan.placement.engine_process(n) == rank]
    for row in rows(plan.model, plan.learner):
        for index, source in enumerate(row.sources):
            for number in numbers:
                span = plan.engines.interval(row, index, experts, number % plan.engines.tp)
                names = [(source.name, 1), (fp8_layout.scale_name(source.name), fp8_layout.BLOCK[row.dim])]
                for name, block in names if names[1][0] in scales else names[:1]:
                    if span:
                        start, stop = span.start // block, -(-span.stop // block)
                        expected.add(name)
                        found = engine.shards[name][1]
                        truth = full[name].narrow(row.dim, start, stop - start).contiguous()
                        if not torch.equal(found.view(torch.uint8), truth.view(torch.uint8)):
                            wrong.append(name)
    assert set(engine.shards) == expected
    return wrong
