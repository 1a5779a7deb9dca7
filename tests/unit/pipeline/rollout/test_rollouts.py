"""Whose turn it is on shared GPUs, and what becomes of an engine that dies when it should leave them."""

import pytest

from pipeline.rollout.engine import EngineError
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.rollouts import Rollouts
from tests.tiny_folder import write_folder
from tests.unit.pipeline.rollout.test_pool import Exporter, request

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


class Trainer(Exporter):
    def __init__(self, told):
        self.told = told

    def empty_cache(self):
        self.told.append("empty cache")


def rollouts(tmp_path, *, colocated, dies=False):
    told, faults = [], []
    folder, _ = write_folder(tmp_path / "model", "llama")
    pool = EnginePool([Turns(told, dies)])
    pool.start(folder)
    return Rollouts(pool, Trainer(told), folder, faults.append, colocated=colocated), told, faults


def test_engines_leave_before_training_and_come_back_with_the_weights(tmp_path):
    found, told, _ = rollouts(tmp_path, colocated=True)
    found.push(1)
    assert found.generate([REQUEST])
    found.make_room()
    with pytest.raises(EngineError, match="push the weights again"):
        found._pool.generate([REQUEST])
    found.push(2)
    (group,) = found.generate([REQUEST])
    assert group.samples[0].drawn_with(2)
    assert told == ["start", "empty cache", "release", "empty cache"]


def test_engines_apart_stay_where_they_are(tmp_path):
    found, told, _ = rollouts(tmp_path, colocated=False)
    found.push(1)
    found.make_room()
    assert found.generate([REQUEST])
    assert told == ["start"]


def test_an_engine_that_dies_instead_is_started_again_and_leaves(tmp_path):
    found, told, faults = rollouts(tmp_path, colocated=True, dies=True)
    found.push(1)
    found.make_room()
    assert faults == ["engine 0 was started again: it is gone"]
    assert told == ["start", "empty cache", "start", "release"]
    found.push(2)
    assert found.generate([REQUEST])
