"""Real SGLang servers, a Llama and a Qwen3, on whatever device there is."""

import importlib.util
import itertools
import json
import os
import signal
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import torch

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the sglang extra", allow_module_level=True)

from pipeline.config.schema import SGLANG_KEEPS_FREE
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.parts import joined, remainder
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.sglang.engine import in_flight
from pipeline.rollout.sglang.liveness import Liveness
from pipeline.rollout.sglang.verify import server_log_probs
from pipeline.types import Role
from tests.decoding import token_log_probs
from tests.integration.servers import (
    FAMILIES,
    REQUESTS,
    TOLERANCE,
    assert_agrees,
    decoder_of,
    generate_request,
    process_group,
    push,
    server_pid,
    source,
)
from tests.tiny_folder import hf_config

pytestmark = pytest.mark.xdist_group("sglang")  # the servers start once


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def wait_until_under_way(engine):
    """What was sent before runs when a later, short request is back: the server takes requests in order."""
    while not running_on(engine):
        time.sleep(0.05)
    engine.generate([generate_request([5], 1, new=2)])


def running_on(engine):
    """Requests that the server works on or queues."""
    (load,) = engine._running.get("/v1/loads")["loads"]
    return load["num_running_reqs"] + load["num_waiting_reqs"]


def test_two_temperatures_in_one_call_agree_with_native(engines, family):
    engine = engines[family]
    push(engine, family, 1, seed=0)
    groups = engine.generate(REQUESTS)
    assert [len(group.samples) for group in groups] == [8, 8, 3]
    assert [group.role for group in groups] == [Role.MAIN, Role.AUXILIARY, Role.MAIN]
    assert_agrees(groups, decoder_of(family, 0))
    for group, wanted in zip(groups, REQUESTS, strict=True):
        assert [s.seed for s in group.samples] == list(wanted.seeds)
        for sample in group.samples:
            assert sample.drawn_with(1)
            assert sample.temperature == wanted.temperature
            stopped = sample.token_ids[-1] == 3
            assert sample.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(sample.token_ids) == wanted.max_new_tokens
    assert engine.generate([]) == []


@pytest.fixture
def two_at_once(engines):
    """Engines that have at most two samples in flight."""

    def reconnect(at_once):
        for engine in engines.values():
            engine._at_once = at_once
            if engine._client is not None:
                engine._client.close()
                engine._client = None

    usual = engines["llama"]._at_once
    reconnect(2)
    yield engines
    reconnect(usual)


def test_samples_wait_for_their_turn(two_at_once):
    engine = two_at_once["llama"]
    push(engine, "llama", 1, seed=0)
    groups = engine.generate(REQUESTS)
    assert [[sample.seed for sample in group.samples] for group in groups] == [list(r.seeds) for r in REQUESTS]
    assert_agrees(groups, decoder_of("llama", 0))


@pytest.fixture
def endless(engines, monkeypatch):
    """The Llama, whose answers end with their length only: a long one is long."""
    engine = engines["llama"]
    body = engine._body

    def without_end(request, place):
        asked = json.loads(body(request, place))
        asked["sampling_params"]["ignore_eos"] = True
        return json.dumps(asked).encode()

    monkeypatch.setattr(engine, "_body", without_end)
    return engine


def test_a_short_group_does_not_wait_for_a_long_one(endless):
    engine = endless
    push(engine, "llama", 1, seed=0)
    long, short = generate_request([4], 1, temperature=0.05, new=450), generate_request([5], 2, new=2)
    finished = [some for groups in engine.stream([long, short]) for some in groups]
    assert [(number, len(group.samples[0].token_ids)) for number, group in finished] == [(1, 2), (0, 450)]


def test_in_flight_goes_by_the_servers_figures(engines):
    info = engines["llama"]._running.get("/server_info")
    assert in_flight(info | {"max_total_num_tokens": 5120, "internal_states": []}, 512) == 80
    state = {"effective_max_running_requests_per_dp": 16}
    assert in_flight(info | {"internal_states": [state]}, 512) == 32
    assert info["internal_states"][0]["effective_max_running_requests_per_dp"] > 0


def test_when_one_sample_fails_the_others_are_aborted_on_the_server(engines, monkeypatch):
    engine = engines["llama"]
    push(engine, "llama", 1, seed=0)
    read = engine._sample

    def fail_late(reply, request, seed, version):
        if request.prompt.token_ids != (4,):
            return read(reply, request, seed, version)
        raise EngineError("failed late")

    monkeypatch.setattr(engine, "_sample", fail_late)
    with pytest.raises(EngineError, match="failed late"):
        engine.generate([generate_request([i], 1, temperature=0.05, new=450 if i > 4 else 2) for i in range(4, 20)])
    monkeypatch.undo()
    engine.generate([generate_request([5], 1, new=2)])  # queued behind the abort
    assert running_on(engine) == 0
    assert_agrees(engine.generate(REQUESTS), decoder_of("llama", 0))


def test_a_server_at_work_answers_every_look_and_its_figures_move(endless):
    engine = endless
    push(engine, "llama", 1, seed=0)
    liveness = Liveness(engine._running, 60, lambda: True)
    long = [generate_request([i], 2, temperature=0.05, new=450) for i in range(4, 20)]
    running = threading.Thread(target=engine.generate, args=(long,))
    running.start()
    figures = []
    while running.is_alive():
        assert liveness.look() == ""
        assert liveness._silent_s < 20, "a busy machine may miss a look or two, not all"
        figures.append(liveness._figures[0])
    running.join()
    assert max(load["num_running_reqs"] for load in figures) > 0
    assert len({load["num_used_tokens"] for load in figures}) > 1


def test_updates_are_served(engines, family):
    engine = engines[family]
    for version in range(2, 9):
        push(engine, family, version)
    assert engine.health().weight_version == 8
    decoder = decoder_of(family, 8)
    assert_agrees(engine.generate(REQUESTS), decoder)
    tokens = [5, 6, 7, 30, 12]
    ours = token_log_probs(decoder, torch.tensor([tokens]))[0]
    np.testing.assert_allclose(server_log_probs(engine._running, tokens), ours.numpy(), atol=TOLERANCE)


def test_an_engine_that_has_left_its_memory_serves_again_after_the_next_update(engines, family):
    """On the CPU the server keeps its memory: what is shown is the order of calls that it takes, not that a GPU is
    freed.
    """
    engine = engines[family]
    push(engine, family, 9)
    engine.release()
    engine.release()
    assert engine.health().alive
    assert engine.health().weight_version is None
    with pytest.raises(EngineError, match="left its GPUs to the learner; push the weights first"):
        engine.generate(REQUESTS)
    push(engine, family, 10)
    assert engine.health().weight_version == 10
    assert_agrees(engine.generate(REQUESTS), decoder_of(family, 10))


def test_the_memory_is_left_once_nothing_runs(endless):
    engine = endless
    push(engine, "llama", 11)
    groups = []
    running = threading.Thread(target=lambda: groups.extend(engine.generate([generate_request([4], 1, new=450)])))
    running.start()
    while not running_on(engine):
        time.sleep(0.05)
    engine.release()
    running.join(200)
    assert len(groups[0].samples[0].token_ids) == 450
    push(engine, "llama", 12)
    assert_agrees(engine.generate(REQUESTS), decoder_of("llama", 12))


def test_a_sample_that_lives_through_an_update_carries_spans(endless):
    engine = endless
    push(engine, "llama", 20)
    groups = []
    long = [generate_request([i, i + 1], 2, temperature=0.05, new=450) for i in range(4, 20)]
    running = threading.Thread(target=lambda: groups.extend(engine.generate(long)))
    running.start()
    wait_until_under_way(engine)
    push(engine, "llama", 21)
    running.join(200)
    samples = [sample for group in groups for sample in group.samples]
    mixed = [sample for sample in samples if len(sample.weight_versions) == 2]
    assert mixed
    for sample in samples:
        bounds = [(span.start, span.end) for span in sample.weight_versions]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == len(sample.token_ids)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
        assert [span.version for span in sample.weight_versions] in ([20], [21], [20, 21])
        assert sample.drawn_with(21) == ([span.version for span in sample.weight_versions] == [21])


@pytest.mark.parametrize("waiting", [False, True])
def test_abort_returns_partial_samples(request, endless, waiting):
    engine, count = request.getfixturevalue("two_at_once")["llama"] if waiting else endless, 8
    push(engine, "llama", 1, seed=0)
    groups = []
    long = [generate_request([i], count, temperature=0.05, new=450) for i in range(4, 20)]
    running = threading.Thread(target=lambda: groups.extend(engine.generate(long)))
    running.start()
    if waiting:
        while not running_on(engine):  # what is asked now would wait for its turn behind all of them
            time.sleep(0.05)
    else:
        wait_until_under_way(engine)
    engine.abort()
    running.join(200)
    assert not running.is_alive()
    samples = [sample for group in groups for sample in group.samples]
    assert any(sample.finish_reason == "abort" and len(sample.token_ids) < 450 for sample in samples)
    assert len(samples) == 16 * count
    if waiting:
        unsent = [sample for sample in samples if len(sample.token_ids) == 0]
        assert unsent
        assert {sample.finish_reason for sample in unsent} == {"abort"}
        version = engine.health().weight_version
        assert {sample.weight_versions[0].version for sample in samples} == {version}
    for sample in samples:
        assert len(sample.token_ids) == len(sample.log_probs) <= 450
    assert engine.generate(REQUESTS)[0].samples[0].finish_reason != "abort"


def test_a_held_response_goes_on_with_the_new_weights(engines):
    """Log-probs of each part are those of the weights that drew it."""
    engine, asked = engines["llama"], [generate_request([i], 2, new=60) for i in range(4, 12)]
    for version, seed, pause in ((1, 0, 20), (2, 5, None)):
        push(engine, "llama", version, seed=seed)
        asked = [replace(request, pause_at=pause) for request in asked]
        groups = map(joined, asked, engine.generate([remainder(request) for request in asked]))
        asked = [replace(request, begun=group.samples) for request, group in zip(asked, groups, strict=True)]
    whole = [(request.prompt, s) for request in asked for s in request.begun]
    assert {s.finish_reason for _, s in whole} <= {"stop", "length"}
    assert max(len(s.token_ids) for _, s in whole) == 60
    parted = [(prompt, s) for prompt, s in whole if len(s.weight_versions) == 2]
    assert parted
    decoders = {1: decoder_of("llama", 0), 2: decoder_of("llama", 5)}
    for prompt, s in parted:
        assert [(span.version, span.start) for span in s.weight_versions] == [(1, 0), (2, 20)]
        tokens = torch.tensor([[*prompt.token_ids, *s.token_ids.tolist()]])
        for span in s.weight_versions:
            exact = token_log_probs(decoders[span.version], tokens, s.temperature)[0, len(prompt.token_ids) - 1 :]
            part = slice(span.start, span.end)
            np.testing.assert_allclose(s.log_probs[part], exact.numpy()[part], atol=TOLERANCE)


def test_an_update_that_does_not_fit_the_server_moves_nothing_into_it(engines, family):
    engine = engines[family]
    given = source(engine, family)
    before = given.sync(engine)
    engine.begin_update(30)
    other = replace(before._order(30), plan_digest="0" * 64)
    with pytest.raises(WeightUpdateError, match="another plan"):
        engine.receive(other)
    with pytest.raises(EngineError, match="push the weights again"):
        engine.generate(REQUESTS)
    assert engine.health().alive
    assert engine.health().weight_version is None
    push(engine, family, 31)
    assert_agrees(engine.generate(REQUESTS), decoder_of(family, 31))


def test_weights_in_the_wrong_place_do_not_commit(engines, family):
    """Every byte is what was sent, but not what the learner computes with: only the probe can see it."""
    engine = engines[family]
    given = source(engine, family)
    given.log_probs = lambda batch: source(engine, family, seed=7).log_probs(batch)
    with pytest.raises(WeightUpdateError, match="verify_update: log-probs differ by"):
        given.sync(engine, probe=True).push(40)
    with pytest.raises(EngineError, match="push the weights again"):
        engine.generate(REQUESTS)
    push(engine, family, 41)
    assert_agrees(engine.generate(REQUESTS), decoder_of(family, 41))


def test_what_sglang_keeps_free_of_a_context(endless):
    push(endless, "llama", 43, seed=0)
    room = hf_config("llama")["max_position_embeddings"] - SGLANG_KEEPS_FREE
    asked = [generate_request([5] * (room - new), 1, new=new) for new in (1, 8)]  # 1: the last token of a held answer
    assert [len(group.samples[0].token_ids) for group in endless.generate(asked)] == [1, 8]
    with pytest.raises(EngineError, match="maximum allowed length"):
        endless.generate([generate_request([5] * room, 1, new=1)])


def test_the_server_names_an_impossible_request(engines):
    with pytest.raises(EngineError, match="400"):
        engines["llama"].generate([generate_request(range(4, 40), 1, new=2000), generate_request([5] * 600, 1)])
    assert engines["llama"].health().alive


class OldRelease(BaseHTTPRequestHandler):
    """A proxy that makes the server look like 0.5.17-0.5.20: no update sessions, no spans."""

    upstream = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._forward("GET")

    def do_POST(self):
        self._forward("POST")

    def _forward(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path in ("/begin_weight_update", "/end_weight_update"):
            return self._reply(404, b'{"detail":"Not Found"}')
        updating = self.path == "/update_weights_from_tensor"
        if updating:
            httpx.post(f"{self.upstream}/begin_weight_update", json={"selector": "all"}, timeout=30).raise_for_status()
        headers = {"Content-Type": "application/json"}
        answer = httpx.request(method, self.upstream + self.path, content=body, headers=headers, timeout=60)
        if updating:
            httpx.post(f"{self.upstream}/end_weight_update", json={}, timeout=30).raise_for_status()
        content = answer.content
        if self.path == "/generate":
            replies = answer.json()
            for reply in replies if isinstance(replies, list) else [replies]:
                reply["meta_info"].pop("weight_versions")
            content = json.dumps(replies).encode()
        return self._reply(answer.status_code, content)

    def _reply(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_the_protocol_of_older_releases(engines, monkeypatch):
    engine = engines["llama"]
    handler = type("Handler", (OldRelease,), {"upstream": engine._server.url})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setattr(engine._server, "url", f"http://127.0.0.1:{proxy.server_port}")
        push(engine, "llama", 50)
        groups = engine.generate(REQUESTS)
        assert all(sample.drawn_with(50) for group in groups for sample in group.samples)
        assert_agrees(groups, decoder_of("llama", 50))
        proxy.shutdown()
    assert not engine._transport.session.supported
    engine._transport.session.supported = True  # the other tests talk to the real server again


def test_a_pool_mixes_engines(engines, folders):
    """One SGLang and one native engine behind one face, with one update for both."""
    native = NativeEngine()
    native.start(folders["llama"])
    pool = EnginePool([engines["llama"], native])
    pool._consistent = True  # both are started
    push(pool, "llama", 60)
    groups = pool.generate(REQUESTS * 2)
    assert [group.prompt for group in groups] == [r.prompt for r in REQUESTS * 2]
    assert all(sample.drawn_with(60) for group in groups for sample in group.samples)
    assert_agrees(groups, decoder_of("llama", 60))
    assert pool.health().weight_version == 60


def test_a_killed_server_is_reported_and_revived(engines, folders):
    engine = engines["qwen3_moe"]
    pool = EnginePool([engine])
    pool._consistent = True  # it is started
    group = server_pid(engine)
    os.kill(group, signal.SIGKILL)
    engine._server._process.wait(60)  # the guard, which has seen all of them end
    assert not process_group(group)
    with pytest.raises(EngineError, match=r"server has ended; end of .*sglang-1\.log"):
        pool.generate(REQUESTS)
    health = engine.health()
    assert not health.alive
    assert "sglang-1.log" in health.detail
    with pytest.raises(WeightUpdateError, match="has ended"):
        engine.begin_update(70)
    assert pool.revive(folders["qwen3_moe"]) == [0]
    assert pool.revive(folders["qwen3_moe"]) == []
    with pytest.raises(EngineError, match="push the weights again"):
        pool.generate(REQUESTS)
    push(pool, "qwen3_moe", 70)
    groups = pool.generate(REQUESTS)
    assert all(sample.drawn_with(70) for group in groups for sample in group.samples)
    assert_agrees(groups, decoder_of("qwen3_moe", 70))
    assert engine._log_path.read_text().count("--- server starts") == 2
