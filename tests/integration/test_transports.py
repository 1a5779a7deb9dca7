"""How weights reach real SGLang servers, and what happens when a process of either side is lost on the way."""

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the sglang extra", allow_module_level=True)

from pipeline.model.grid import Grid
from pipeline.model.layout import rows
from pipeline.reshard.execute import LearnerShards
from pipeline.reshard.link import Group
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.rollouts import Rollouts
from pipeline.rollout.sglang.engine import build_transport
from tests.integration.servers import (
    REQUESTS,
    assert_agrees,
    decoder_of,
    process_group,
    push,
    server_pid,
    source,
)
from tests.plan_source import Source, local_parameters

pytestmark = pytest.mark.xdist_group("sglang")  # the servers start once

GRIDS = {"TP2": Grid(tp=2), "PP2": Grid(pp=2), "TP2 PP2": Grid(tp=2, pp=2), "DP2": Grid(dp=2)}
TIMEOUT_S = 10.0  # of an update; it is waited for where a process stands still


@pytest.fixture
def by_disk(engines, folders, monkeypatch):
    """An engine that takes weights from a folder."""
    engine = engines["llama tp2"]
    monkeypatch.setattr(engine._config, "weight_transport", "disk")
    engine._transport = build_transport(engine._config, engine._server, folders["llama"], engine._scratch)
    yield engine
    engine._transport.close()
    monkeypatch.undo()
    engine._transport = build_transport(engine._config, engine._server, folders["llama"], engine._scratch)


def pool_of(*engines):
    pool = EnginePool(engines)
    pool._consistent = True  # they are started
    return pool


@pytest.mark.parametrize("name", ["llama", "llama tp2", "qwen3_moe"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("colocated", [False, True], ids=["apart", "colocated"])
def test_every_rank_receives_its_slices_and_no_other_byte(engines, name, grid, colocated):
    engine, family = engines[name], name.split()[0]
    given = source(engine, family, learner=GRIDS[grid], colocated=colocated)
    sync = given.sync(engine)
    for version in (101, 102):
        sync.push(version)
        plan = given.inputs.plan()
        least = [int(plan.bounds.need[report.process]) for report in engine._transport.reports]
        assert [report.received_bytes for report in engine._transport.reports] == least
        assert min(least) > 0
    groups = engine.generate(REQUESTS)
    assert all(sample.drawn_with(102) for group in groups for sample in group.samples)
    assert_agrees(groups, decoder_of(family, 102))
    assert not list(engine._scratch.glob("*"))


def test_a_folder_on_the_disk_updates_a_server_of_two_ranks(by_disk):
    for version in (103, 104):
        push(by_disk, "llama", version)
    assert_agrees(by_disk.generate(REQUESTS), decoder_of("llama", 104))
    assert not by_disk._scratch.exists()


def test_a_request_that_the_server_refuses_fails_at_once_and_the_next_push_mends(engines):
    engine = engines["llama"]
    given = source(engine, "llama")
    sync, begun = given.sync(EnginePool([engine])), time.monotonic()
    # Behind our back: the server will not take what is sent.
    engine_begin = engine.begin_update
    engine.begin_update = lambda version: (engine_begin(version), engine._server.post("/end_weight_update"))
    try:
        with pytest.raises(WeightUpdateError, match=r"receive: .*400.*must run between"):
            sync.push(110)
    finally:
        del engine.begin_update
    assert time.monotonic() - begun < 20
    assert engine.health().alive
    engine._transport.session._open = False
    sync.push(111)
    assert_agrees(engine.generate(REQUESTS), decoder_of("llama", 111))


def rank_pids(engine):
    """The server's ranks, by their titles."""
    found = {}
    for pid in process_group(server_pid(engine)):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        if "scheduler" in title:
            found[title] = int(pid)
    return [found[title] for title in sorted(found)]


def in_the_second_exchange(monkeypatch, sabotage):
    """Call ``sabotage`` once, when this process's second exchange begins: some bytes have moved, others have not."""
    exchange, calls, lock = Group.exchange, [], threading.Lock()

    def spoilt(self, sends, receives):
        if sends or receives:
            with lock:
                calls.append(1)
                if len(calls) == 2:
                    sabotage()
        exchange(self, sends, receives)

    monkeypatch.setattr(Group, "exchange", spoilt)


@pytest.mark.parametrize(
    ("victim", "number", "learner"),
    [
        ("head", signal.SIGKILL, None),
        ("head", signal.SIGSTOP, None),
        ("rank", signal.SIGKILL, None),
        ("rank", signal.SIGSTOP, Grid(tp=2)),
    ],
    ids=["head lost", "head stopped", "rank lost", "colocated rank stopped"],
)
def test_a_server_lost_or_stopped_in_mid_update_is_revived_with_one_version(
    engines, folders, monkeypatch, victim, learner, number
):
    engine = engines["llama tp2"]
    monkeypatch.setattr(engine._config, "weight_sync_timeout_s", TIMEOUT_S)
    given = source(engine, "llama", learner=learner, colocated=learner is not None)

    def sabotage():
        os.kill(server_pid(engine) if victim == "head" else rank_pids(engine)[1], number)
        if victim == "head" and number == signal.SIGSTOP:  # the ranks go on without it
            time.sleep(0.1)

    in_the_second_exchange(monkeypatch, sabotage)
    faults = []
    pool = pool_of(engine)
    rollouts = Rollouts(pool, given, given.sync(pool, TIMEOUT_S), folders["llama"], faults.append)
    rollouts.push(120)
    (fault,) = faults
    assert "engine 0 was started again: push of weight version 120 failed in receive" in fault
    assert pool.health().weight_version == 120
    groups = rollouts.generate(REQUESTS)
    assert all(sample.drawn_with(120) for group in groups for sample in group.samples)
    assert_agrees(groups, decoder_of("llama", 120))


def send_as_a_process(pipe):
    """A learner rank of its own; it says that it is in the middle of an update, and then takes a while."""
    from pipeline.reshard.participant import Participant
    from tests.tiny_folder import hf_config, random_tensors

    exchange, calls = Group.exchange, []

    def slow(self, sends, receives):
        calls.append(1)
        if len(calls) == 2:
            pipe.send("in the middle")
            time.sleep(60)
        exchange(self, sends, receives)

    Group.exchange = slow
    pipe.send("ready")
    order = pipe.recv()
    plan = order.inputs.plan()
    full = random_tensors(hf_config("llama"), order.version)
    shards = local_parameters(plan.model, order.inputs.learner, 1, full)
    reader = LearnerShards(rows(plan.model, order.inputs.learner), order.inputs.learner, 1, shards)
    Participant().send(order, 1, reader)


class HalfAProcess(Source):
    """Of two learner ranks the second is a process of its own, which gets ``number`` in its second exchange, once."""

    number = None

    def strike_with(self, number):
        """Start that process, and wait until it has imported what it needs."""
        self.number = number
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=send_as_a_process, args=(theirs,))
        self.process.start()
        assert self.pipe.recv() == "ready"

    def send(self, order):
        if self.number is None:
            return super().send(order)
        number, self.number = self.number, None
        self.sent.append(order)
        self.pipe.send(order)

        def strike():
            self.pipe.recv()
            os.kill(self.process.pid, number)

        threading.Thread(target=strike, daemon=True).start()
        full = self.weights(order.version)
        shards = local_parameters(self.model, self.learner, 0, full)
        reader = LearnerShards(rows(self.model, self.learner), self.learner, 0, shards)
        try:
            self.ranks[0].send(order, 0, reader)
        finally:
            if number == signal.SIGSTOP:
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()
            how = "died" if number == signal.SIGKILL else "did not answer"
            raise EngineError(f"learner: its process {how}")


@pytest.mark.parametrize("colocated", [False, True], ids=["apart", "colocated"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_learner_rank_lost_or_stopped_in_mid_update_leaves_engines_that_refuse_and_take_the_next(
    engines, number, colocated
):
    engine = engines["llama tp2"]
    push(engine, "llama", 129)
    plain = source(engine, "llama", learner=Grid(tp=2))
    given = HalfAProcess(
        Path(plain.inputs.model_path), plain.weights, plain.inputs.engines, Grid(tp=2), colocated=colocated
    )
    given.strike_with(number)
    sync = given.sync(engine, TIMEOUT_S)
    with pytest.raises(WeightUpdateError, match="push of weight version 130 failed in receive: learner: its process"):
        sync.push(130)
    assert engine.health().alive
    with pytest.raises(EngineError, match="push the weights again"):
        engine.generate(REQUESTS)
    sync.push(131)
    assert_agrees(engine.generate(REQUESTS), decoder_of("llama", 131))


def test_a_failed_verification_leaves_both_engines_refusing(engines, folders, monkeypatch):
    """No engine serves a version that not all have: one holds it, verified, when the other fails."""
    good = NativeEngine()
    good.start(folders["llama"])
    bad = engines["llama"]
    pool = pool_of(bad, good)
    push(pool, "llama", 130)
    monkeypatch.setattr("pipeline.rollout.sglang.verify.check", fail)
    with pytest.raises(WeightUpdateError, match="another computation"):
        push(pool, "llama", 131)
    for engine in (good, bad):
        with pytest.raises(EngineError, match="push the weights again"):
            engine.generate(REQUESTS)
        assert engine.health().alive
    monkeypatch.undo()
    push(pool, "llama", 132)
    assert_agrees(pool.generate(REQUESTS), decoder_of("llama", 132))


def fail(*args):
    raise EngineError("another computation")
