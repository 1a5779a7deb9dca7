"""Answers that are held across updates, while engines die or the run ends."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from pipeline.rollout.engine import EngineError
from pipeline.rollout.holding import ClosedError, Holding
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.rollouts import Rollouts
from tests.tiny_folder import write_folder
from tests.unit.pipeline.rollout.test_pool import request, sync_of

VERSIONS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), "llama")[0]


@dataclass
class Asked:
    """Requests that go through two updates."""

    left: dict = field(default_factory=lambda: {i: request(i, samples=2, new=9) for i in range(4)})
    times_held: int = 0
    updates: int = VERSIONS - 1


class Noting(NativeEngine):
    """Notes what it is asked of answers that went through both updates; may die after its first group of them."""

    def __init__(self, dies=False):
        super().__init__(eos_token_ids=())
        self.dies, self.asked = dies, []

    def stream(self, requests):
        last = self._version == VERSIONS - 1
        self.asked += [(each.prompt.id, each.seeds) for each in requests if last]
        for some in super().stream(requests):
            if self.dies and last:
                yield some[:1]
                super().close()
                raise EngineError("its process died")
            yield some


def drawn(folder, *engines):
    """The groups by number, each token at the version by count, and what the run was told of faults."""
    faults = []
    pool = EnginePool(engines, take_over=True)
    pool.start(folder)
    sync = sync_of(pool, folder)
    rollouts = Rollouts(pool, sync._learner, sync, folder, faults.append)
    rollouts.push(0)
    holding = Holding(rollouts, partial=True, by_count=True)
    holding.begin()
    with ThreadPoolExecutor(1) as thread:
        groups = thread.submit(lambda: [pair for some in holding.stream(Asked()) for pair in some])
        groups.add_done_callback(lambda _: holding.end())
        for version in range(1, VERSIONS):
            holding.settle()
            rollouts.push(version)
            holding.release()
        found = groups.result(60)
    pool.close()
    return found, faults


def parts_of(found):
    return {
        i: [(s.seed, s.token_ids.tolist(), s.finish_reason, s.weight_versions) for s in group.samples]
        for i, group in found
    }


def test_an_answer_held_across_two_updates_outlives_its_engine(folder):
    """Another engine is asked for it once, under its seed, with the tokens of the two versions before."""
    whole, _ = drawn(folder, Noting(), Noting())
    engines = Noting(dies=True), Noting()
    found, faults = drawn(folder, *engines)
    assert len(found) == 4, "each group exactly once"
    assert parts_of(found) == parts_of(whole)
    assert {
        tuple((span.version, span.start, span.end) for span in s.weight_versions) for _, g in found for s in g.samples
    } == {((0, 0, 3), (1, 3, 6), (2, 6, 9))}
    dead, other = (engine.asked for engine in engines)
    again = [each for each in other if each in dead]
    assert again
    assert len(other) == len(set(other))
    assert not faults, "nobody had to wait for a new engine"


def test_a_run_that_ends_while_engines_are_paused_ends_cleanly(folder):
    """In the middle of an update, with answers held: nobody waits for ever, and what is held stays."""
    asked = Asked()
    pool = EnginePool([Noting()])
    pool.start(folder)
    holding = Holding(Rollouts(pool, None, None, folder), partial=True, by_count=True)
    holding.begin()
    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(lambda: list(holding.stream(asked)))
        drawing.add_done_callback(lambda _: holding.end())
        holding.settle()
        pool.begin_update(1)
        ending = threading.Thread(target=lambda: (holding.close(), holding.close()), daemon=True)
        ending.start()
        ending.join(20)
        assert not ending.is_alive()
        with pytest.raises(ClosedError):
            drawing.result(20)
    pool.close()
    assert {len(s.token_ids) for r in asked.left.values() for s in r.begun} == {3}
