"""Every way by which weights reach real SGLang servers, and what happens when one is lost on the way."""

import importlib.util
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the sglang extra", allow_module_level=True)

from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.rollouts import Rollouts
from pipeline.rollout.sglang.engine import build_transport
from pipeline.rollout.transport import Deadline
from tests.integration.servers import REQUESTS, assert_agrees, buckets, decoder_of, push, server_pid

pytestmark = pytest.mark.xdist_group("sglang")  # the servers start once

TRANSPORTS = ("tensor", "distributed", "disk")


@pytest.fixture
def use(engines, folders, monkeypatch):
    """Change the engines' transport, all at the same time as a pool's start does."""

    def change(name, transport):
        engine = engines[name]
        monkeypatch.setattr(engine._config, "weight_transport", transport)
        engine._transport.close()
        engine._transport = build_transport(engine._config, engine._server, folders[name.split()[0]], engine._scratch)
        engine._transport.connect(Deadline(60))

    def change_all(transport):
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda name: change(name, transport), engines))

    yield change_all
    monkeypatch.undo()
    change_all("tensor")


def pool_of(*engines):
    pool = EnginePool(engines)
    pool._consistent = True  # they are started
    return pool


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport_updates_every_server(engines, use, transport):
    use(transport)
    llamas = pool_of(engines["llama"], engines["llama tp2"])
    for version in (101, 102):
        push(llamas, "llama", version)
        push(engines["qwen3"], "qwen3", version)
    for engine in (engines["llama"], engines["llama tp2"]):  # not through the pool: each of them
        groups = engine.generate(REQUESTS)
        assert all(sample.drawn_with(102) for group in groups for sample in group.samples)
        assert_agrees(groups, decoder_of("llama", 102))
    assert_agrees(engines["qwen3"].generate(REQUESTS), decoder_of("qwen3", 102))
    assert not engines["llama"]._scratch.exists()


def test_a_broadcast_that_the_server_refuses_fails_at_once_and_the_next_push_mends(engines, use):
    use("distributed")
    engine = engines["llama"]
    engine.begin_update(110)
    engine._server.post("/end_weight_update")  # behind our back: the server will not receive what we send
    begun = time.monotonic()
    with pytest.raises(WeightUpdateError, match=r"load_bucket 1/3: .*400.*must run between"):
        engine.load_bucket(next(buckets("llama", 110, 110)))
    assert time.monotonic() - begun < 10
    engine.abort_update()
    assert engine.health().alive
    engine._transport.session._open = False
    push(engine, "llama", 111)
    assert_agrees(engine.generate(REQUESTS), decoder_of("llama", 111))


class Saboteur:
    """The part of a learner that a push needs; in its first export it calls ``sabotage`` after the first bucket."""

    def __init__(self, sabotage):
        self.sabotage = sabotage

    def export_shards(self, version):
        for bucket in buckets("llama", version, version):
            yield bucket
            sabotage, self.sabotage = self.sabotage, lambda: None
            sabotage()


@pytest.mark.parametrize(
    ("transport", "signals"),
    [
        ("tensor", {"llama": signal.SIGSTOP}),
        ("distributed", {"llama": signal.SIGKILL, "llama tp2": signal.SIGSTOP}),
    ],
    ids=["tensor", "distributed"],
)
def test_servers_lost_and_stopped_in_mid_update_are_revived_with_one_version(
    engines, folders, use, monkeypatch, transport, signals
):
    use(transport)
    chosen = {name: engines[name] for name in signals}
    for engine, number in zip(chosen.values(), signals.values(), strict=True):
        if number == signal.SIGSTOP:
            monkeypatch.setattr(engine._config, "weight_sync_timeout_s", 4.0)

    def sabotage():
        for name, number in signals.items():
            os.killpg(server_pid(engines[name]), number)

    pool, faults = pool_of(*chosen.values()), []
    rollouts = Rollouts(pool, Saboteur(sabotage), folders["llama"], faults.append)
    rollouts.push(120)
    (fault,) = faults
    numbers = ", ".join(str(i) for i in range(len(chosen)))
    assert f"engine {numbers} was started again: push of weight version 120 failed in load_bucket 2" in fault
    for engine, number in zip(chosen.values(), signals.values(), strict=True):
        assert f"{engine._name}: update to version 120: load_bucket 2/3" in fault
        if number == signal.SIGSTOP:
            assert (
                "load_bucket 2/3 took longer than 4 s; if the server is merely slow, raise rollout.weight_sync" in fault
            )
    assert pool.health().weight_version == 120
    groups = rollouts.generate(REQUESTS)
    assert all(sample.drawn_with(120) for group in groups for sample in group.samples)
    assert_agrees(groups, decoder_of("llama", 120))


def test_a_failed_verification_leaves_both_engines_refusing(engines, use, monkeypatch):
    """No engine serves a version that not all have: one holds it, verified, when the other fails."""
    use("tensor")
    good, bad = engines["llama"], engines["llama tp2"]
    pool = pool_of(good, bad)
    push(pool, "llama", 130)

    def fail(*args):
        raise EngineError("rows read back differently")

    pool.begin_update(131)
    for bucket in buckets("llama", 131, 131):
        pool.load_bucket(bucket)
    monkeypatch.setattr(bad._verifier, "check", fail)
    with pytest.raises(EngineError, match="read back differently"):
        pool.verify_update(131)
    pool.abort_update()
    for engine in (good, bad):
        with pytest.raises(EngineError, match="push the weights again"):
            engine.generate(REQUESTS)
        assert engine.health().alive
    monkeypatch.undo()
    push(pool, "llama", 132)
    assert_agrees(pool.generate(REQUESTS), decoder_of("llama", 132))
