"""Whose turn it is on shared GPUs, and what becomes of an engine that dies when it should leave them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pipeline.rollout.engine import EngineError
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.parts import joined, remainder
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.rollouts import Rollouts
from tests.tiny_folder import write_folder
from tests.unit.pipeline.rollout.test_pool import request, sync_of

REQUEST = request(1)


class Turns(NativeEngine):
    """An engine that tells when it leaves its memory, and dies at the first time if it is told to."""

    def __init__(self, told, dies=False):
        super().__init__()
        self.told, self.dies = told, dies

    def start(self, hf_path):
        self.told.append("start")
        super().start(hf_path)

    def release(self):
        if self.dies:
            self.dies = False
            super().close()
            raise EngineError("it is gone")
        self.told.append("release")


def rollouts(tmp_path, *, colocated, dies=False):
    told, faults = [], []
    folder, _ = write_folder(tmp_path / "model", "llama")
    pool = EnginePool([Turns(told, dies)])
    pool.start(folder)
    sync = sync_of(pool, folder)
    sync._learner.empty_cache = lambda: told.append("empty cache")
    return Rollouts(pool, sync._learner, sync, folder, faults.append, colocated=colocated), told, faults


def test_engines_leave_before_training_and_come_back_with_the_weights(tmp_path):
    found, told, _ = rollouts(tmp_path, colocated=True)
    found.push(1)
    assert found.generate([REQUEST])
    with found.training(2):
        pass
    with pytest.raises(EngineError, match="push the weights again"):
        found._pool.generate([REQUEST])
    found.push(2)
    (group,) = found.generate([REQUEST])
    assert group.samples[0].drawn_with(2)
    assert told == ["start", "empty cache", "release", "empty cache"]


def test_engines_apart_stay_where_they_are(tmp_path):
    found, told, _ = rollouts(tmp_path, colocated=False)
    found.push(1)
    with found.training(2):
        pass
    assert found.generate([REQUEST])
    assert told == ["start"]


def test_an_engine_that_dies_instead_is_started_again_and_leaves(tmp_path):
    found, told, faults = rollouts(tmp_path, colocated=True, dies=True)
    found.push(1)
    with found.training(2):
        pass
    assert faults == ["engine 0 was started again: it is gone"]
    assert told == ["start", "empty cache", "start", "release"]
    found.push(2)
    assert found.generate([REQUEST])


class Wrong(NativeEngine):
    """Spoils what it draws, as often as it is told to: every sample, or each request's first."""

    def __init__(self, spoil, times, all_of_them):
        super().__init__()
        self.spoil, self.times, self.all = spoil, times, all_of_them

    def stream(self, requests):
        self.times -= 1
        for some in super().stream(requests):
            yield [(i, self.spoilt(group) if self.times >= 0 else group) for i, group in some]

    def spoilt(self, group):
        samples = tuple(self.spoil(s) if self.all or not i else s for i, s in enumerate(group.samples))
        return replace(group, samples=samples)


def log_prob(value):
    return lambda s: replace(s, log_probs=np.full_like(s.log_probs, value))


SPOILT = {
    "log-probs that are not finite": log_prob(np.nan),
    "more tokens than allowed": lambda s: replace(
        s, token_ids=np.tile(s.token_ids, 99), log_probs=np.tile(s.log_probs, 99)
    ),
    "token ids beyond the vocabulary": lambda s: replace(s, token_ids=s.token_ids + 10**6),
    "tokens and log-probs of different number": lambda s: replace(s, log_probs=s.log_probs[1:]),
}


def wrong(tmp_path, spoil, times=1, all_of_them=False):
    faults = []
    folder, _ = write_folder(tmp_path / "model", "llama")
    pool = EnginePool([Wrong(spoil, times, all_of_them)])
    pool.start(folder)
    sync = sync_of(pool, folder)
    return Rollouts(pool, sync._learner, sync, folder, faults.append), faults


@pytest.mark.parametrize("fault", SPOILT)
def test_what_an_engine_gets_wrong_is_left_out_and_told(tmp_path, fault):
    asked = replace(REQUEST, seeds=(1, 2, 3))
    found, faults = wrong(tmp_path, SPOILT[fault])
    first, *others = found.generate([asked])[0].samples
    assert (first.finish_reason, len(first.token_ids), len(first.log_probs)) == ("abort", 0, 0)
    assert all(len(sample.token_ids) for sample in others)
    assert faults == [f"1 samples are left out: 1 with {fault}"]
    assert found.generate([asked])[0].samples[0].finish_reason != "abort"


def test_minus_infinity_is_no_log_prob(tmp_path):
    found, faults = wrong(tmp_path, log_prob(-np.inf))
    found.generate([replace(REQUEST, seeds=(1, 2))])
    assert faults == ["1 samples are left out: 1 with log-probs that are not finite"]


def test_where_nothing_is_right_all_is_drawn_once_more(tmp_path):
    found, faults = wrong(tmp_path, log_prob(np.nan), all_of_them=True)
    (group,) = found.generate([REQUEST])
    assert all(np.isfinite(sample.log_probs).all() and len(sample.token_ids) for sample in group.samples)
    assert len(faults) == 1
    found, _ = wrong(tmp_path, log_prob(np.nan), times=2, all_of_them=True)
    with pytest.raises(
        EngineError, match=r"no sample of \d+ is fit for use, twice in a row: \d+ with log-probs that are not fin"
    ):
        found.generate([REQUEST])


def test_missing_samples_and_groups_are_noticed(tmp_path):
    found, faults = wrong(tmp_path, lambda s: s)
    whole = found._pool.stream
    found._pool.stream = lambda requests, wanted: (
        [(i, replace(g, samples=g.samples[1:])) for i, g in some] for some in whole(requests)
    )
    assert len(found.generate([replace(REQUEST, seeds=(1, 2))])[0].samples) == 1
    assert faults == ["1 samples are left out: 1 with no answer"]
    found._pool.stream = lambda requests, wanted: (some[1:] for some in whole(requests))
    with pytest.raises(EngineError, match="engines answered 2 requests with 1 groups"):
        found.generate([REQUEST, REQUEST])


class DiesInCompany(NativeEngine):
    """Dies while two calls are drawn from it."""

    def __init__(self):
        super().__init__()
        self.calls, self.meeting = 0, threading.Barrier(2, timeout=20)

    def stream(self, requests):
        self.calls += 1
        if self.calls > 2:
            yield from super().stream(requests)
            return
        if self.meeting.wait() == 0:
            super().close()
        self.meeting.wait()
        raise EngineError("its process died")


def test_calls_that_lose_an_engine_at_once_have_it_started_again_once(tmp_path):
    """Each goes on under its seeds, with the tokens that it had been held with."""
    faults = []
    folder, _ = write_folder(tmp_path / "model", "llama")
    alone = NativeEngine()
    alone.start(folder)
    pool = EnginePool([DiesInCompany()])
    pool.start(folder)
    sync = sync_of(pool, folder)
    found = Rollouts(pool, sync._learner, sync, folder, faults.append)
    found.push(0)
    sync_of(EnginePool([alone]), folder).push(0)
    asked = [replace(request(i, new=9), pause_at=4) for i in (1, 2)]
    begun = [replace(r, begun=joined(r, alone.generate([remainder(r)])[0]).samples, pause_at=None) for r in asked]
    with ThreadPoolExecutor(2) as threads:
        groups = [each[0] for each in threads.map(lambda one: found.generate([one]), begun)]
    assert faults == ["engine 0 was started again: its process died"]
    whole = alone.generate([replace(r, begun=()) for r in begun])
    for group, twin in zip(groups, whole, strict=True):
        assert [s.token_ids.tolist() for s in group.samples] == [s.token_ids.tolist() for s in twin.samples]
