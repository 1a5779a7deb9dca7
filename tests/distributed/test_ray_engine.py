"""A rollout engine in its own Ray process: what its driver learns of failures and of a process that stands still."""

import os
import re
import signal
from functools import partial

import pytest
import ray

from launchers import environment
from launchers.run.actors import LOCALHOST, EngineProcess, LearnerRank, RayEngine
from launchers.run.ray_cluster import variables
from launchers.supervise.roll_call import ROLL_CALL
from pipeline.reshard.engine_grid import EngineGrid
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.rollouts import Rollouts
from pipeline.types import GenerateRequest, Prompt
from tests.plan_source import Source
from tests.tiny_folder import hf_config, random_tensors, write_folder

REQUEST = GenerateRequest(Prompt("p", (5, 6), "", None, "exact"), (1, 2), 1.0, 4)


class Engine(NativeEngine):
    """A native engine that says which process it is in."""

    def pid(self):
        return os.getpid()


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def pool(cluster, tmp_path):
    spawn = partial(EngineProcess.options(num_cpus=0).remote, Engine)
    engines = [RayEngine(spawn, f"engine {i}", timeout_s=2.0) for i in range(2)]
    pool = EnginePool(engines)
    pool.start(write_folder(tmp_path / "model", "llama")[0])
    yield pool
    pool.close()


class Looker:
    """In a learner's place: says what its process was given."""

    def given(self):
        return os.nice(0), environment.values(["CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"])


def looker(rank, address):
    return Looker()


def test_a_learner_s_process_is_not_niced_and_has_its_variables_from_the_start(cluster):
    options = {"num_cpus": 0, "num_gpus": 0, "runtime_env": {"env_vars": variables(learner=True)}}
    actor = LearnerRank.options(**options).remote()
    ray.get(actor.build.remote(looker, 0, (LOCALHOST, 1), 1))
    niceness, found = ray.get(actor.call.remote("given"))
    ray.kill(actor)
    assert niceness == os.nice(0)
    assert found == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def sync_of(pool, folder, timeout_s=2.0):
    source = Source(folder, lambda version: random_tensors(hf_config("llama"), version), EngineGrid(count=2))
    return source.sync(pool, timeout_s)


def test_a_sender_that_does_not_come_is_named_before_any_commit(pool, tmp_path):
    sync = sync_of(pool, tmp_path / "model")
    pool.begin_update(1)
    with pytest.raises(WeightUpdateError, match="learner rank 0 did not come within 2 s"):
        pool.receive(sync._order(1))
    with pytest.raises(WeightUpdateError, match="before every engine has verified"):
        pool.commit_update(1)
    pool.abort_update()
    assert [engine.health().weight_version for engine in pool._engines] == [None, None]


def verified(pool, tmp_path):
    """An update that every engine has, and none has committed."""
    sync = sync_of(pool, tmp_path / "model", 60.0)
    order = sync._order(1)
    pool.begin_update(1)
    sync._transfer(order)
    pool.verify_update(1)


def test_a_driver_goes_on_while_an_engine_commits(pool, tmp_path):
    verified(pool, tmp_path)
    pid = pool._engines[1]._call("pid")
    os.kill(pid, signal.SIGSTOP)
    pool.commit_update(1)
    os.kill(pid, signal.SIGCONT)
    assert pool.health().weight_version == 1
    assert all(sample.drawn_with(1) for group in pool.generate([REQUEST, REQUEST]) for sample in group.samples)


def test_a_process_that_stands_still_as_it_commits_is_named_when_it_is_to_draw(pool, tmp_path):
    verified(pool, tmp_path)
    os.kill(pool._engines[1]._call("pid"), signal.SIGSTOP)
    pool.commit_update(1)
    with pytest.raises(WeightUpdateError, match="engine 1: commit_update: its process did not answer within 4 s"):
        pool.generate([REQUEST, REQUEST])
    assert not pool._engines[1].health().alive


def test_a_process_that_stands_still_is_named_and_started_again(pool, tmp_path):
    still = pool._engines[1]
    pid = still._call("pid")
    actions = [lambda: os.kill(pid, signal.SIGSTOP)]
    sync = sync_of(pool, tmp_path / "model")
    sync._learner.before_send = lambda: actions and actions.pop()()
    faults = []
    rollouts = Rollouts(pool, sync._learner, sync, tmp_path / "model", faults.append)
    rollouts.push(3)
    (fault,) = faults
    assert fault.startswith("engine 1 was started again: push of weight version 3 failed in receive: ")
    # Its process may or may not have come to the meeting before it stood still.
    assert re.search(r"engine 1: begin_update, receive, verify_update: its process did not answer within 12 s", fault)
    assert "raise rollout.weight_sync_timeout_s (2)" in fault
    assert still._call("pid") != pid
    assert pool.health().weight_version == 3
    bytes_moved, buckets = sync.size()
    figures = {"sync": {"bytes": bytes_moved, "buckets": buckets}}
    assert rollouts.figures() == figures | {"engines": {"alive": 1, "total": 2}}  # one had to be started again
    assert rollouts.figures() == figures | {"engines": {"alive": 2, "total": 2}}
    groups = rollouts.generate([REQUEST])
    assert all(sample.drawn_with(3) for sample in groups[0].samples)


def test_a_roll_call_finds_the_one_that_stands_still(pool, tmp_path):
    pids = [engine._call("pid") for engine in pool._engines]
    os.kill(pids[1], signal.SIGSTOP)
    assert ROLL_CALL.collect(tmp_path) == ["engine-1"]
    well, still = ((tmp_path / f"engine-{i}.txt").read_text() for i in range(2))
    assert well.startswith(f"pid {pids[0]} on ")
    assert "in main_loop" in well
    assert re.search(rf"pid {pids[1]} on .*: ray::EngineProcess.*\nState:\tT \(stopped\)", still)
    ROLL_CALL.end_silent()
    with pytest.raises(EngineError, match="engine 1: its process died"):
        pool._engines[1]._call("pid")
    assert pool._engines[0]._call("pid") == pids[0]
    assert pool.revive(tmp_path / "model") == [1]
    assert ROLL_CALL.collect(tmp_path) == [], "the new one answers to the name"
