"""Engine ranks that share a learner rank's process receive, from it alone, bit for bit what they need."""

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from pipeline.model import fp8, fp8_layout
from pipeline.model.grid import Grid
from pipeline.model.layout import rows
from pipeline.reshard import handover
from pipeline.reshard.digest import plan_digest
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.execute import LearnerShards, QuantisedShards
from pipeline.reshard.link import Group
from pipeline.reshard.order import Order, PlanInputs
from pipeline.reshard.participant import Participant
from pipeline.reshard.places import HostPlaces
from tests.plan_source import local_parameters
from tests.tiny_folder import hf_config, random_tensors, write_folder

CASES = {
    "TP2 to TP2": (Grid(tp=2), EngineGrid(2)),
    "TP2 PP2 to 2 x TP2": (Grid(tp=2, pp=2), EngineGrid(2, count=2)),
    "PP2 DP2 to TP2, some learner ranks alone": (Grid(pp=2, dp=2), EngineGrid(2)),
    "DP4 to 3 engines": (Grid(dp=4), EngineGrid(count=3)),
}


@pytest.fixture(scope="module")
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def order_of(folder, store, case, gpus_per_node=4, dtype="fp32", bucket_bytes=4096, timeout_s=20.0):
    learner, engines = case
    placement = Placement.consecutive(learner.world_size, engines.world_size, True, gpus_per_node)
    inputs = PlanInputs(str(folder), learner, engines, placement, bucket_bytes, dtype)
    number = order_of.number = order_of.number + 10
    return Order(number, 7, inputs, plan_digest(inputs.plan()), ("127.0.0.1", store.port), number, timeout_s)


order_of.number = 0


def update(order, parties, full):
    """What every learner rank moved, or what it raised; then every engine rank's report and its places."""
    plan, placement = order.inputs.plan(), order.inputs.placement
    found = [None] * placement.members
    places = [HostPlaces() for _ in range(placement.engines)]

    def send(rank):
        shards = local_parameters(plan.model, order.inputs.learner, rank, full)
        reader = LearnerShards(rows(plan.model, order.inputs.learner), order.inputs.learner, rank, shards)
        reader = QuantisedShards(reader) if order.inputs.dtype.startswith("fp8") else reader
        try:
            found[rank] = parties[rank].send(order, rank, reader)
        except (RuntimeError, ValueError) as error:
            found[rank] = error

    def receive(rank):
        member = placement.learners + rank
        found[member] = parties[member].receive(order, rank, places[rank])

    threads = [threading.Thread(target=send, args=(rank,)) for rank in range(placement.learners)]
    threads += [threading.Thread(target=receive, args=(rank,)) for rank in range(placement.engines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found[: placement.learners], found[placement.learners :], places


@pytest.mark.parametrize("gpus_per_node", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_engine_rank_gets_what_it_needs_through_the_memory_of_its_learner_rank(
    tmp_path, store, name, gpus_per_node
):
    folder, _ = write_folder(tmp_path / "model", "qwen3")
    order = order_of(folder, store, CASES[name], gpus_per_node)
    plan = order.inputs.plan()
    parties = [Participant() for _ in range(order.inputs.placement.members)]
    for version in (1, 2):  # the second over the same groups
        full = random_tensors(hf_config("qwen3"), version)
        moved, reports, places = update(replace(order, number=order.number + version), parties, full)
        assert [report.error for report in reports] == [""] * len(reports), moved
        least = plan.bounds.need[: len(reports)].tolist()
        assert [report.received_bytes for report in reports] == least
        assert [each.received for each in moved] == plan.bounds.ingress.tolist()
        assert [each.received + each.copied for each in moved[: len(reports)]] == least
        for process, place in enumerate(places):
            for index, span in plan.needs(process).items():
                tensor = plan.tensors[index]
                expected = full[tensor.name].narrow(tensor.dim, span.start, len(span))
                assert place.tensors[tensor.name].equal(expected)


@pytest.mark.parametrize("learner", [Grid(dp=2), Grid(tp=2)], ids=["quantised before", "and after"])
def test_fp8_codes_are_those_of_the_whole_tensors(tmp_path, store, learner):
    folder, _ = write_folder(tmp_path / "model", "qwen3")
    order = order_of(folder, store, (learner, EngineGrid(count=2)), dtype="fp8 fp32", bucket_bytes=1 << 16)
    parties = [Participant() for _ in range(order.inputs.placement.members)]
    full = random_tensors(hf_config("qwen3"), 1)
    moved, reports, places = update(order, parties, full)
    assert [report.error for report in reports] == ["", ""], moved
    name = "model.layers.0.mlp.up_proj.weight"
    for place in places:
        codes, scales = fp8.quantise(full[name])
        assert place.tensors[name].view(torch.uint8).equal(codes.view(torch.uint8))
        assert place.tensors[fp8_layout.scale_name(name)].equal(scales)


def test_the_buffer_is_filled_again_only_when_the_engine_has_copied(tmp_path, store, monkeypatch):
    """An engine that takes its time still finds every message whole."""
    folder, _ = write_folder(tmp_path / "model", "qwen3")
    order = order_of(folder, store, CASES["TP2 to TP2"], bucket_bytes=1024)
    arrived, waited = handover.EngineShards.arrived, threading.Event()

    def slowly(self, messages):
        waited.wait(0.002)
        arrived(self, messages)

    monkeypatch.setattr(handover.EngineShards, "arrived", slowly)
    parties = [Participant() for _ in range(4)]
    moved, reports, _ = update(order, parties, random_tensors(hf_config("qwen3"), 1))
    assert [report.error for report in reports] == ["", ""]
    assert sum(each.copied + each.received for each in moved) == sum(report.received_bytes for report in reports)
    handed = [len(stage.own) for stage in parties[0]._mover.stages]
    assert sum(handed) > 20, "the buffer was filled many times"


def test_a_byte_that_changes_in_the_shared_memory_is_found(tmp_path, store, monkeypatch):
    folder, _ = write_folder(tmp_path / "model", "qwen3")
    order = order_of(folder, store, CASES["TP2 to TP2"])
    arrived = handover.Handover.arrived

    def spoil(self, messages):
        messages[0].buffer[3] ^= 1
        arrived(self, messages)

    monkeypatch.setattr(handover.Handover, "arrived", spoil)
    parties = [Participant() for _ in range(4)]
    moved, reports, _ = update(order, parties, random_tensors(hf_config("qwen3"), 1))
    assert all("bytes differ from what process" in report.error for report in reports)
    assert all("lost in the middle" in str(error) for error in moved)


@pytest.mark.parametrize("silent", ["learner", "engine"])
def test_who_stands_still_in_the_middle_does_not_keep_the_others_beyond_the_time(tmp_path, store, monkeypatch, silent):
    folder, _ = write_folder(tmp_path / "model", "qwen3")
    order = order_of(folder, store, CASES["TP2 to TP2"], timeout_s=2.0)
    exchange, over = Group.exchange, threading.Event()
    still = {"learner": handover.LEARNER, "engine": handover.ENGINE}[silent]
    calls = []

    def stands(self, sends, receives):
        if self.name == "pair-1" and self._rank == still:
            calls.append(1)
            if len(calls) == 4:
                over.wait(4)
        exchange(self, sends, receives)

    monkeypatch.setattr(Group, "exchange", stands)
    parties = [Participant() for _ in range(4)]
    moved, reports, _ = update(order, parties, random_tensors(hf_config("qwen3"), 1))
    assert reports[1].error
    assert isinstance(moved[1], RuntimeError)


def shared():
    """Shared memory that this process maps, and that it has open."""
    gc.collect()  # of tests before, in which something failed
    mapped = sum("memfd:weights" in line for line in Path("/proc/self/maps").read_text().splitlines())
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return mapped, sum("memfd:weights" in os.readlink(link) for link in links if os.path.islink(link))


def test_no_shared_memory_is_left(tmp_path, store):
    folder, _ = write_folder(tmp_path / "model", "qwen3")
    order = order_of(folder, store, CASES["TP2 to TP2"])
    parties = [Participant() for _ in range(4)]
    full = random_tensors(hf_config("qwen3"), 1)

    before = shared()
    for number in (1, 2):
        _, reports, _ = update(replace(order, number=order.number + number), parties, full)
        assert [report.error for report in reports] == ["", ""]
        assert shared() == before
