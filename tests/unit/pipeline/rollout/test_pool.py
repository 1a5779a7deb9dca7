import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.checksum import checksum
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.pool import EnginePool, split_requests
from pipeline.rollout.weight_sync import push_weights
from pipeline.types import GenerateRequest, Prompt, WeightBucket
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

    def load_bucket(self, bucket):
        self._fail_in("load_bucket")
        super().load_bucket(bucket)

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


class Exporter:
    """The part of a learner that a push needs: weights of seed = version, in three buckets."""

    fails_after = None

    def export_shards(self, version):
        tensors = random_tensors(hf_config("llama"), version)
        names = sorted(tensors)
        for i in range(3):
            if i == self.fails_after:
                raise RuntimeError("rank 1 ran out of memory")
            part = {name: tensors[name] for name in names[i::3]}
            yield WeightBucket(version, i, 3, part, checksum(part))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), "llama")[0]


def request(i, samples=3, new=6, temperature=1.0):
    prompt = Prompt(str(i), (*range(4, 5 + i % 5), i), "", None, "exact")
    return GenerateRequest(prompt, tuple(range(100 * i, 100 * i + samples)), temperature, new)


def tokens_of(groups):
    return [[sample.token_ids.tolist() for sample in group.samples] for group in groups]


REQUESTS = [request(i, samples=1 + i % 4, new=4 + i, temperature=1 + 0.1 * (i % 2)) for i in range(9)]


def started(engines, folder):
    pool = EnginePool(engines)
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
        def generate(self, requests):
            barrier.wait()  # breaks unless both engines are inside
            return super().generate(requests)

    pool = started([Meeting(), Meeting()], folder)
    assert len(pool.generate(REQUESTS)) == len(REQUESTS)
    pool.close()


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 50)), max_size=30).map(
        lambda sizes: [request(i, samples=s, new=n) for i, (s, n) in enumerate(sizes)]
    ),
    st.integers(1, 6),
)
def test_split_gives_every_request_once_and_balances(requests, engines):
    shares = split_requests(requests, engines)
    assert shares == split_requests(requests, engines)
    assert sorted(i for share in shares for i in share) == list(range(len(requests)))
    work = [len(r.prompt.token_ids) + len(r.seeds) * r.max_new_tokens for r in requests]
    loads = [sum(work[i] for i in share) for share in shares]
    # Graham's bound for list scheduling: nobody has more than the mean plus the largest piece.
    assert max(loads) <= sum(work) / engines + max(work, default=0)


def test_a_push_is_served(folder):
    pool = started([NativeEngine(), NativeEngine()], folder)
    push_weights(Exporter(), pool, 4)
    assert pool.health().weight_version == 4
    assert all(sample.drawn_with(4) for group in pool.generate(REQUESTS) for sample in group.samples)
    pool.close()


def test_push_never_looks_into_opaque_buckets(folder):
    """Over Ray the driver holds handles; here a box that only the engine opens."""

    class Box:
        def __init__(self, content):
            self.__content = content

        def open(self):
            return self.__content

    class Opener(NativeEngine):
        def load_bucket(self, bucket):
            super().load_bucket(bucket.open())

    class Boxer(Exporter):
        def export_shards(self, version):
            return map(Box, super().export_shards(version))

    engine = Opener()
    engine.start(folder)
    push_weights(Boxer(), engine, 2)
    assert engine.health().weight_version == 2


@pytest.mark.parametrize("phase", ["begin_update", "load_bucket", "verify_update", "commit_update"])
def test_one_failing_engine_makes_the_pool_refuse_until_a_push_succeeds(folder, phase):
    good = NativeEngine()
    pool = started([good, FailingEngine(phase)], folder)
    with pytest.raises(WeightUpdateError, match=rf"version 1 failed in {phase}.*broken cable"):
        push_weights(Exporter(), pool, 1)
    with pytest.raises(EngineError, match="push the weights again"):
        pool.generate(REQUESTS)
    assert pool.health().weight_version is None
    assert good.health().weight_version is None, "its update was aborted"
    push_weights(Exporter(), pool, 2)
    assert all(sample.drawn_with(2) for group in pool.generate(REQUESTS) for sample in group.samples)
    pool.close()


def test_a_failing_export_leaves_the_pool_refusing(folder):
    pool = started([NativeEngine(), NativeEngine()], folder)
    learner = Exporter()
    learner.fails_after = 2
    with pytest.raises(WeightUpdateError, match=r"export after bucket 2.*out of memory"):
        push_weights(learner, pool, 1)
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
    push_weights(Exporter(), pool, 3)
    assert log == ["verified"] * 3 + ["commits"] * 3
    pool.begin_update(4)
    for bucket in Exporter().export_shards(4):
        pool.load_bucket(bucket)
    with pytest.raises(WeightUpdateError, match="before every engine has verified"):
        pool.commit_update(4)
    pool.close()


def test_revive_starts_the_dead_engines_and_the_pool_waits_for_weights(folder):
    living, dead = FailingEngine(""), FailingEngine("")
    pool = started([living, dead], folder)
    push_weights(Exporter(), pool, 1)
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
    push_weights(Exporter(), pool, 1)
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
    push_weights(Exporter(), pool, 1)
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
