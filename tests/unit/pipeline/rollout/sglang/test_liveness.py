"""A server that owes answers is given up when it is silent, never because it is slow; a program stands in for it."""

import math
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from pipeline.config.schema import RolloutConfig, SglangConfig
from pipeline.rollout.engine import EngineError, EngineTimeoutError
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.sglang import liveness as module
from pipeline.rollout.sglang.engine import SglangEngine
from pipeline.rollout.sglang.liveness import Liveness
from pipeline.types import GenerateRequest, Prompt, Role
from tests.stub_server import GENERATE, Stub

REQUESTS = [GenerateRequest(Prompt("p", (5, 6), "", None, "exact"), (0, 1, 2), 1.0, 4, Role.MAIN)]


@pytest.fixture
def engine_on(tmp_path):
    """An engine on a stub that acts as told."""
    engines = []

    pytest.importorskip("aiohttp")

    def make(limit_s, *, reply_s=60.0, healthy_s=math.inf, moves=True):
        program = GENERATE.format(reply_s=reply_s, healthy_s=healthy_s, moves=moves).replace(" inf:", " 1e9:")
        settings = SglangConfig(liveness_timeout_s=limit_s)
        engine = SglangEngine(RolloutConfig(engine="sglang", sglang=settings), index=0, log_dir=tmp_path, seed=0)
        engine._server = Stub(program, tmp_path, liveness_timeout_s=limit_s)
        engine._server.start()
        engine._version, engine._committed, engine._at_once = 0, {0}, 8
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def test_an_answer_may_take_longer_than_any_limit(engine_on):
    engine = engine_on(0.6, reply_s=1.2)
    (group,) = engine.generate(REQUESTS)
    assert [sample.token_ids.tolist() for sample in group.samples] == [[7], [7], [7]]
    assert engine.health().alive


def test_an_engine_that_is_three_times_slower_gets_a_third(engine_on):
    engines = [engine_on(60, reply_s=0.6), engine_on(60, reply_s=0.2)]
    pool = EnginePool(engines, measured=True)
    pool._consistent = True
    asked = [replace(REQUESTS[0], prompt=replace(REQUESTS[0].prompt, id=str(i)), seeds=(i,)) for i in range(8)]
    dealt = []
    for engine in engines:
        engine.stream = counted(engine.stream, dealt, engines.index(engine))
    for _ in range(3):
        assert len(pool.generate(asked)) == 8
    counts = [dict(dealt[i : i + 2]) for i in (0, 2, 4)]
    assert counts[0] == {0: 4, 1: 4}, "nothing is known"
    assert counts[1] == counts[2] == {0: 2, 1: 6}


def counted(stream, dealt, number):
    def counting(requests):
        dealt.append((number, len(requests)))
        return stream(requests)

    return counting


@pytest.mark.parametrize(
    ("acts", "said"),
    [
        ({"healthy_s": 0.8}, "has not answered /health for 0"),
        ({"moves": False}, "has generated nothing for its requests for 0"),
    ],
)
def test_a_silent_server_is_ended_and_is_dead(engine_on, acts, said):
    engine = engine_on(0.3, **acts)
    with pytest.raises(EngineTimeoutError, match=rf"{said}.*raise rollout\.sglang\.liveness_timeout_s \(0\.3\)"):
        engine.generate(REQUESTS)
    health = engine.health()
    assert not health.alive
    assert said in health.detail


def test_a_stopped_server_is_ended(engine_on):
    engine = engine_on(0.3)
    guard = engine._server._process.pid
    with open(f"/proc/{guard}/task/{guard}/children") as children:
        os.kill(int(children.read().split()[0]), signal.SIGSTOP)
    with pytest.raises(EngineTimeoutError, match="has not answered /health"):
        engine.generate(REQUESTS)
    assert not engine.health().alive


def test_a_server_that_dies_is_found_at_once(engine_on):
    engine = engine_on(60)
    threading.Timer(0.3, lambda: os.kill(engine._server._process.pid, signal.SIGKILL)).start()
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"the server (has ended|runs but does not answer)"):
        engine.generate(REQUESTS)
    assert time.monotonic() - begun < 30, "not after the time that a silent one has"
    assert not engine.health().alive


class Server:
    """Answers the paths that it is told to."""

    alive = True

    def __init__(self):
        self.paths = {"/health", "/model_info"}
        self.load = {"timestamp": 0.0, "num_running_reqs": 1, "num_waiting_reqs": 0, "num_used_tokens": 0}

    def answers(self, path, timeout_s):
        return path in self.paths

    def get(self, path, *, timeout_s):
        self.load["timestamp"] += 1
        return {"loads": [dict(self.load)]}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def looks(liveness, clock, seconds, step=10):
    said = ""
    for _ in range(int(seconds / step)):
        clock[0] += step
        said = said or liveness.look()
    return said


def test_silence_is_added_up_and_ends_with_an_answer(clock):
    server = Server()
    liveness = Liveness(server, 300, lambda: True)
    assert looks(liveness, clock, 10) == ""
    assert looks(liveness, clock, 290) == ""
    server.load["num_used_tokens"] += 1
    assert looks(liveness, clock, 300) == ""  # the first of them sees the change
    assert "has generated nothing" in looks(liveness, clock, 10)


def test_an_idle_server_need_not_generate(clock):
    server = Server()
    server.load["num_running_reqs"] = 0  # the answers are on their way to or from it
    assert looks(Liveness(server, 300, lambda: True), clock, 3000) == ""


def test_a_paused_server_is_asked_only_whether_it_is_there(clock):
    server, serving = Server(), [False]
    server.paths = {"/model_info"}
    liveness = Liveness(server, 300, lambda: serving[0])
    assert looks(liveness, clock, 3000) == ""
    server.paths = set()
    assert "/model_info" in looks(liveness, clock, 310)


def test_a_look_during_which_the_pause_begins_says_nothing(clock):
    server = Server()
    server.paths = {"/model_info"}
    states = iter([True, False])
    liveness = Liveness(server, 300, lambda: next(states))
    clock[0] += 130
    assert liveness.look() == ""
    assert liveness._silent_s == 0


def test_a_suspended_job_is_not_the_servers_silence(clock):
    server = Server()
    server.paths = set()
    liveness = Liveness(server, 300, lambda: True)
    clock[0] += 86400
    assert liveness.look() == ""


def test_an_ended_process_is_told_at_the_first_look():
    server = Server()
    server.alive = False
    assert Liveness(server, 300, lambda: True).look() == "the server process ended"
