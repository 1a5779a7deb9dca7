import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reshard.engine_grid import EngineGrid
from pipeline.rollout.deal import split_requests
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.load import Load, work
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.pool import EnginePool
from pipeline.types import GenerateRequest, Prompt
from tests.plan_source import Source
from tests.tiny_folder import hf_config, random_tensors, write_folder


class FailingEngine(NativeEngine):
    """A native engine that fails, once, in one phase; and counts its closings."""

    def __init__(self, phase):
        super().__init__()
        self.phase = phase
        self.closed = 0

    def _fail_in(self, phase):
        if self.phase == phase:
            self.phase = ""
            raise WeightUpdateError(f"broken cable in {phase}")

    def start(self, hf_path):
        self._fail_in("start")
        super().start(hf_path)

    def begin_update(self, version):
        self._fail_in("begin_update")
        super().begin_update(version)

    def receive(self, order, engine=0):
        self._fail_in("receive")
        super().receive(order, engine)

    def verify_update(self, version):
        self._fail_in("verify_update")
        super().verify_update(version)

    def commit_update(self, version):
        self._fail_in("commit_update")
        super().commit_update(version)

    def close(self):
        super().close()
        self.closed += 1
        self._fail_in("close")


def sync_of(pool, folder, timeout_s=60.0):
    """Pushes weights of seed = version into every engine of ``pool``."""
    source = Source(folder, lambda version: random_tensors(hf_config("llama"), version), EngineGrid(count=len(pool)))
    return source.sync(pool, timeout_s)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), "llama")[0]


def request(i, samples=3, new=6, temperature=1.0):
    prompt = Prompt(str(i), (*range(4, 5 + i % 5), i), "", None, "exact")
    return GenerateRequest(prompt, tuple(range(100 * i, 100 * i + samples)), temperature, new)


def tokens_of(groups):
    return [[sample.token_ids.tolist() for sample in group.samples] for group in groups]


REQUESTS = [request(i, samples=1 + i % 4, new=4 + i, temperature=1 + 0.1 * (i % 2)) for i in range(9)]


def started(engines, folder, **options):
    pool = EnginePool(engines, **options)
    pool.start(folder)
    return pool


@pytest.mark.parametrize("count", [1, 2, 3])
def test_samples_do_not_depend_on_the_number_of_engines(folder, count):
    alone = NativeEngine()
    alone.start(folder)
    pool = started([NativeEngine() for _ in range(count)], folder)
    groups = pool.generate(REQUESTS)
    assert [g.prompt.id for g in groups] == [r.prompt.id for r in REQUESTS]
    assert tokens_of(groups) == tokens_of(alone.generate(REQUESTS))
    pool.close()


def test_engines_run_at_the_same_time(folder):
    barrier = threading.Barrier(2, timeout=10)

    class Meeting(NativeEngine):
        def stream(self, requests):
            barrier.wait()  # breaks unless both engines are inside
            yield from super().stream(requests)

    pool = started([Meeting(), Meeting()], folder)
    assert len(pool.generate(REQUESTS)) == len(REQUESTS)
    pool.close()


class Dying(NativeEngine):
    """Dies after its first group."""

    def stream(self, requests):
        for some in super().stream(requests):
            yield some[:1]
            super().close()
            raise EngineError("its process died")


def test_what_a_dead_engine_had_not_finished_is_asked_of_the_others_once(folder):
    asked = []

    class Noting(NativeEngine):
        def stream(self, requests):
            asked.extend(request.seeds for request in requests)
            yield from super().stream(requests)

    alone = NativeEngine()
    alone.start(folder)
    pool = started([Dying(), Noting(), Noting()], folder, take_over=True)
    finished = [number for some in pool.stream(REQUESTS) for number, _ in some]
    assert sorted(finished) == list(range(len(REQUESTS))), "each exactly once"
    assert len(asked) == len(set(asked)) == len(REQUESTS) - 1
    pool.close()
    pool = started([Dying(), NativeEngine()], folder, take_over=True)
    assert tokens_of(pool.generate(REQUESTS)) == tokens_of(alone.generate(REQUESTS))
    pool.close()


def finished_by(pool, left):
    """Positions, until an engine dies."""
    found = set()
    with suppress(EngineError):
        for some in pool.stream(REQUESTS, left):
            found |= {number for number, _ in some}
    return found


def test_a_revived_engine_draws_what_was_its_share(folder):
    everything = set(range(len(REQUESTS)))
    pool, share = started([NativeEngine(), Dying()], folder), set(split_requests(REQUESTS, [Load(), Load()])[1])
    left = everything - finished_by(pool, everything)
    assert left < share
    assert len(left) == len(share) - 1
    pool._engines[1].start(folder)
    assert finished_by(pool, left) < left
    pool.close()


def test_nobody_takes_over_twice(folder):
    pool = started([Dying(), Dying()], folder, take_over=True)
    with pytest.raises(EngineError, match="its process died"):
        pool.generate(REQUESTS)
    pool.close()


def test_an_error_of_an_engine_that_lives_is_raised(folder):
    class Refusing(NativeEngine):
        def stream(self, requests):
            raise EngineError("prompt too long")
            yield

    pool = started([Refusing(), NativeEngine()], folder)
    with pytest.raises(EngineError, match="prompt too long"):
        pool.generate(REQUESTS)
    pool.close()


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 50)), max_size=30).map(
        lambda sizes: [request(i, samples=s, new=n) for i, (s, n) in enumerate(sizes)]
    ),
    st.integers(1, 6),
)
def test_split_gives_every_request_once_and_balances(requests, engines):
    loads = [Load() for _ in range(engines)]
    shares = split_requests(requests, loads)
    assert shares == split_requests(requests, loads)
    assert sorted(i for share in shares for i in share) == list(range(len(requests)))
    work = [len(r.prompt.token_ids) + len(r.seeds) * r.max_new_tokens for r in requests]
    dealt = [sum(work[i] for i in share) for share in shares]
    # Graham's bound for list scheduling: nobody has more than the mean plus the largest piece.
    assert max(dealt) <= sum(work) / engines + max(work, default=0)


@given(
    st.lists(st.builds(request, st.integers(0, 99), st.integers(1, 8), st.integers(1, 500)), max_size=40),
    st.lists(st.tuples(st.integers(0, 10**4), st.floats(0.1, 10)), min_size=1, max_size=6),
)
def test_split_balances_the_ends_of_engines_that_differ(requests, engines):
    """Nobody who was dealt something ends later than he who ends first would with one piece more."""
    loads = [Load() for _ in engines]
    for load, (had, speed) in zip(loads, engines, strict=True):
        load.add(had)
        load.learn(1, 1 / speed)
    shares = split_requests(requests, loads)
    assert sorted(i for share in shares for i in share) == list(range(len(requests)))
    pieces = [work(each) for each in requests]
    ends = [(had + sum(pieces[i] for i in own)) / speed for own, (had, speed) in zip(shares, engines, strict=True)]
    for own, end in zip(shares, ends, strict=True):
        if own:
            most = min(e + max(pieces) / speed for e, (_, speed) in zip(ends, engines, strict=True))
            assert end <= most * (1 + 1e-9)


def test_an_engine_of_which_nothing_is_known_is_taken_for_the_mean_of_the_others():
    loads = [Load() for _ in range(3)]
    loads[0].learn(10, 1.0)
    loads[1].learn(30, 1.0)
    dealt = [len(share) for share in split_requests([request(1)] * 60, loads)]
    assert dealt == [10, 30, 20]


def test_what_is_in_hand_counts_until_it_is_finished(folder):
    class Held(NativeEngine):
        def stream(self, requests):
            asked.append(len(requests))
            held.wait(10)
            yield from super().stream(requests)

    held, asked = threading.Event(), []
    pool = started([Held(), Held()], folder, measured=True)
    first = threading.Thread(target=pool.generate, args=([request(1, samples=8)],))
    first.start()
    while not asked:
        pass
    second = threading.Thread(target=pool.generate, args=([request(2, samples=1)] * 4,))
    second.start()
    while len(asked) < 2:
        pass
    assert asked == [1, 4], "the idle engine takes all of the second call"
    held.set()
    first.join()
    second.join()
    assert [load.expected for load in pool._loads] == [0, 0]
    pool.close()


def test_a_push_is_served(folder):
    pool = started([NativeEngine(), NativeEngine()], folder)
    sync_of(pool, folder).push(4)
    assert pool.health().weight_version == 4
    assert all(sample.drawn_with(4) for group in pool.generate(REQUESTS) for sample in group.samples)
    pool.close()


def test_every_engine_takes_what_is_its_own(folder):
    """Engines are numbered as in the plan; each ends with whole tensors, wherever these came from."""
    engines = [NativeEngine() for _ in range(3)]
    pool = started(engines, folder)
    sync_of(pool, folder).push(4)
    alone = NativeEngine()
    alone.start(write_folder(folder.parent / "seed4", "llama", seed=4)[0])
    expected = tokens_of(alone.generate(REQUESTS))
    assert [tokens_of(engine.generate(REQUESTS)) for engine in engines] == [expected] * 3
    pool.close()


@pytest.mark.parametrize("phase", ["begin_update", "receive", "verify_update", "commit_update"])
def test_one_failing_engine_makes_the_pool_refuse_until_a_push_succeeds(folder, phase):
    good = NativeEngine()
    pool = started([good, FailingEngine(phase)], folder)
    sync = sync_of(pool, folder)
    started_at = time.monotonic()
    with pytest.raises(WeightUpdateError, match=rf"version 1 failed in {phase}.*broken cable"):
        sync.push(1)
    assert time.monotonic() - started_at < 40, "nobody waits for an engine that has said no"
    with pytest.raises(EngineError, match="push the weights again"):
        pool.generate(REQUESTS)
    assert pool.health().weight_version is None
    assert good.health().weight_version is None, "its update was aborted"
    sync.push(2)
    assert all(sample.drawn_with(2) for group in pool.generate(REQUESTS) for sample in group.samples)
    pool.close()


def test_an_engine_that_was_started_again_in_mid_update_refuses_the_order_at_once(folder):
    class Restarting(NativeEngine):
        lives = 1

        def begin_update(self, version):
            super().begin_update(version)
            if self.lives:
                self.lives -= 1
                self.close()
                self.start(folder)

    pool = started([NativeEngine(), Restarting()], folder)
    sync, started_at = sync_of(pool, folder), time.monotonic()
    with pytest.raises(WeightUpdateError, match="receive outside an update; call begin_update"):
        sync.push(1)
    assert time.monotonic() - started_at < 40, "nobody waits for it"
    with pytest.raises(EngineError, match="push the weights again"):
        pool.generate(REQUESTS)
    sync.push(2)
    assert all(sample.drawn_with(2) for group in pool.generate(REQUESTS) for sample in group.samples)
    pool.close()


def test_a_failing_sender_leaves_the_pool_refusing(folder):
    pool = started([NativeEngine(), NativeEngine()], folder)
    sync = sync_of(pool, folder)

    def fail():
        raise RuntimeError("rank 1 ran out of memory")

    sync._learner.before_send = fail
    with pytest.raises(WeightUpdateError, match=r"version 1 failed in receive.*out of memory"):
        sync.push(1)
    with pytest.raises(EngineError, match="push the weights again"):
        pool.generate(REQUESTS)
    pool.close()


def test_commit_needs_the_update_that_began(folder):
    pool = started([NativeEngine(), NativeEngine()], folder)
    with pytest.raises(WeightUpdateError, match="in progress is None"):
        pool.commit_update(1)


def test_no_engine_commits_before_all_have_verified(folder):
    log = []

    class Logging(NativeEngine):
        def __init__(self, delay):
            super().__init__()
            self.delay = delay

        def verify_update(self, version):
            time.sleep(self.delay)
            super().verify_update(version)
            log.append("verified")

        def commit_update(self, version):
            log.append("commits")
            super().commit_update(version)

    pool = started([Logging(0), Logging(0.2), Logging(0.1)], folder)
    sync = sync_of(pool, folder)
    sync.push(3)
    assert log == ["verified"] * 3 + ["commits"] * 3
    pool.begin_update(4)
    sync._transfer(sync._order(4))
    with pytest.raises(WeightUpdateError, match="before every engine has verified"):
        pool.commit_update(4)
    pool.close()


def test_revive_starts_the_dead_engines_and_the_pool_waits_for_weights(folder):
    living, dead = FailingEngine(""), FailingEngine("")
    pool = started([living, dead], folder)
    sync = sync_of(pool, folder)
    sync.push(1)
    assert pool.revive(folder) == []
    before = tokens_of(pool.generate(REQUESTS))  # nobody was dead, so nothing has changed
    NativeEngine.close(dead)
    with pytest.raises(EngineError, match="not started"):
        pool.generate(REQUESTS)
    assert pool.revive(folder) == [1]
    assert (living.closed, dead.closed) == (0, 1)
    assert (living.health().weight_version, dead.health().weight_version) == (1, 0)
    with pytest.raises(EngineError, match="push the weights again"):
        pool.generate(REQUESTS)
    sync.renew()
    sync.push(1)
    assert tokens_of(pool.generate(REQUESTS)) == before
    pool.close()


def test_a_failed_revival_can_be_repeated(folder):
    engine = FailingEngine("")
    pool = started([engine], folder)
    NativeEngine.close(engine)
    engine.phase = "start"
    with pytest.raises(EngineError, match="broken cable in start"):
        pool.revive(folder)
    with pytest.raises(EngineError, match="push the weights again"):
        pool.generate(REQUESTS)
    assert pool.revive(folder) == [0]
    sync_of(pool, folder).push(1)
    assert len(pool.generate(REQUESTS)) == len(REQUESTS)


def test_a_failing_start_closes_all_engines(folder):
    good, bad = FailingEngine(""), FailingEngine("start")
    with pytest.raises(EngineError, match="broken cable in start"):
        EnginePool([good, bad]).start(folder)
    assert (good.closed, bad.closed) == (1, 1)


def test_close_closes_all_even_when_one_raises(folder):
    engines = [FailingEngine("close"), FailingEngine(""), FailingEngine("close")]
    pool = started(engines, folder)
    with pytest.raises(EngineError, match="broken cable in close"):
        pool.close()
    assert [engine.closed for engine in engines] == [1, 1, 1]
    with pytest.raises(EngineError):
        pool.generate(REQUESTS)


def test_a_pool_needs_an_engine():
    with pytest.raises(EngineError, match=r"rollout\.engines"):
        EnginePool([])


def test_engines_are_busy_while_they_have_requests(folder):
    class Held(NativeEngine):
        def stream(self, requests):
            started.wait(10)
            yield from super().stream(requests)

    for count in (1, 2):
        started, pool = threading.Event(), EnginePool([Held() for _ in range(count)])
        pool.start(folder)
        assert pool.busy() == [[]] * count
        thread = threading.Thread(target=pool.generate, args=(REQUESTS,))
        begun = time.perf_counter()
        thread.start()
        while not any(pool.busy()):
            pass
        started.set()
        thread.join()
        spans = pool.busy()
        assert all(begun < begin < end < time.perf_counter() for ((begin, end),) in spans)
        pool.generate(REQUESTS[:1])
        assert sum(map(len, pool.busy())) == 1, "one request, one engine"
        pool.close()
