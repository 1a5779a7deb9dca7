"""Orders travel as JSON, and processes that cannot take part say so instead of being waited for."""

import socket
import threading
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from pipeline.model.grid import Grid
from pipeline.model.layout import rows
from pipeline.reshard import link
from pipeline.reshard.digest import plan_digest
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.execute import LearnerShards
from pipeline.reshard.link import CPU, Group, Link, LinkError, refuse
from pipeline.reshard.order import Order, PlanInputs
from pipeline.reshard.participant import Participant
from pipeline.reshard.places import HostPlaces
from tests.tiny_folder import hf_config, random_tensors, write_folder


@pytest.fixture(scope="module")
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def order(store, tmp_path, request):
    folder, _ = write_folder(tmp_path / "model", "qwen3")
    inputs = PlanInputs(str(folder), Grid(), EngineGrid(2), Placement.consecutive(1, 2, False), 1 << 16, "fp32")
    number = abs(hash(request.node.name)) % 10**9
    return Order(number, 7, inputs, plan_digest(inputs.plan()), ("127.0.0.1", store.port), number, 20.0)


def shards_of_rank(order):
    """The one learner rank's parameters, as Megatron lays them out."""
    plan = order.inputs.plan()
    full = random_tensors(hf_config("qwen3"), 1)
    parameters = {}
    for row in rows(plan.model, order.inputs.learner):
        parameters[row.parameter] = shard = full[row.sources[0].name].new_zeros(row.local_shape(1))
        for cut in row.slices(1, 0):
            source = full[row.sources[cut.source].name].narrow(row.dim, cut.source_start, cut.length)
            shard.narrow(row.dim, cut.start, cut.length).copy_(source)
    return full, LearnerShards(rows(plan.model, order.inputs.learner), order.inputs.learner, 0, parameters)


def at_once(*actions):
    """Results of all, each in a thread of its own; an exception is a result."""
    results = [None] * len(actions)

    def run(index):
        try:
            results[index] = actions[index]()
        except (RuntimeError, ValueError) as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_threads_of_one_process_take_their_slices_and_keep_the_group(order):
    full, reader = shards_of_rank(order)
    parties = [Participant() for _ in range(3)]
    received = [HostPlaces(), HostPlaces()]
    groups = []
    for turn in range(2):
        now = replace(order, number=order.number + turn)
        sent, *reports = at_once(
            lambda now=now: parties[0].send(now, 0, reader),
            *(lambda now=now, p=p: parties[p].receive(now, p - 1, received[p - 1]) for p in (1, 2)),
        )
        assert [report.error for report in reports] == ["", ""]
        assert sent.sent == sum(report.received_bytes for report in reports)
        assert [report.received_bytes for report in reports] == order.inputs.plan().bounds.ingress[1:].tolist()
        groups.append([party._link.plan._group for party in parties])
    assert groups[0] == groups[1]
    plan = order.inputs.plan()
    for process, places in enumerate(received, start=1):
        for index, span in plan.needs(process).items():
            tensor = plan.tensors[index]
            expected = full[tensor.name].narrow(tensor.dim, span.start, len(span))
            assert places.tensors[tensor.name].equal(expected)


def test_another_plan_is_told_to_everyone_before_any_byte_moves(order):
    _, reader = shards_of_rank(order)
    other = replace(order, plan_digest="0" * 64)
    error, first, second = at_once(
        lambda: Participant().send(order, 0, reader),
        lambda: Participant().receive(other, 0, HostPlaces()),
        lambda: Participant().receive(order, 1, HostPlaces()),
    )
    assert isinstance(error, LinkError)
    for said in (str(error), first.error, second.error):
        assert "another plan" in said
    assert first.received_bytes == second.received_bytes == 0


def test_who_cannot_come_is_not_waited_for(order):
    _, reader = shards_of_rank(order)
    error, report, _ = at_once(
        lambda: Participant().send(order, 0, reader),
        lambda: Participant().receive(order, 0, HostPlaces()),
        lambda: refuse(order, [2], "its server has ended"),
    )
    assert "engine rank 1: its server has ended" in str(error)
    assert "engine rank 1: its server has ended" in report.error


def test_who_does_not_come_is_named_when_the_time_is_over(order):
    _, reader = shards_of_rank(order)
    late = replace(order, timeout_s=1.0)
    error, report = at_once(
        lambda: Participant().send(late, 0, reader),
        lambda: Participant().receive(late, 0, HostPlaces()),
    )
    assert "engine rank 1 did not come within 1 s" in str(error)
    assert "engine rank 1 did not come within 1 s" in report.error


def test_nobody_waits_for_a_store_whose_process_is_stopped(order, store, monkeypatch):
    """The kernel takes connections to a stopped process, and no byte comes back."""
    monkeypatch.setattr(link, "_GRACE_S", 0.1)
    met = Link(replace(order, timeout_s=0.1), 0, CPU)
    stopped = threading.Event()
    monkeypatch.setattr(met, "_hear", lambda order, keys: stopped.wait())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        late = replace(order, timeout_s=0.1, store=silent.getsockname())
        asked = lambda: Participant().receive(late, 0, HostPlaces())  # noqa: E731
        report, meeting, refused = at_once(asked, lambda: met.come(late, "word"), lambda: refuse(late, [0], "why"))
    stopped.set()
    for said in (report.error, str(meeting)):
        assert said.endswith(f"the store at 127.0.0.1:{late.store[1]}, where all processes meet, does not answer")
    assert refused is None


def test_a_byte_that_changes_on_its_way_is_found(order, monkeypatch):
    _, reader = shards_of_rank(order)
    exchange = Group.exchange

    def spoil(self, sends, receives):
        exchange(self, sends, receives)
        if self._rank == 2 and receives:
            receives[0][1][5] ^= 1

    monkeypatch.setattr(Group, "exchange", spoil)
    _, _, bad = at_once(
        lambda: Participant().send(order, 0, reader),
        lambda: Participant().receive(order, 0, HostPlaces()),
        lambda: Participant().receive(order, 1, HostPlaces()),
    )
    assert "bytes differ from what process 0 sent, within" in bad.error
    assert bad.process == 2
