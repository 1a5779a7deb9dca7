"""What the actors' classes do, without Ray."""

import pytest
import ray
import torch

from launchers.run.actors import LOCALHOST, SENT_BYTES, LearnerRank, RayLearner
from pipeline.batching.dealing import Cut, Dealer
from tests.grids import distinct


class Learner:
    """Counts its calls and returns a grid; ranks 0 and 1 hold the first share, for which 0 speaks, 2 the second."""

    def __init__(self, rank: int) -> None:
        self.calls, self.dealer = 0, None
        self.data_parallel_rank, self.speaks = rank // 2, rank in (0, 2)

    def statistics(self, rows: int) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"entropy": torch.zeros(rows)}


def made():
    for rank in range(3):
        actor = LearnerRank.__ray_metadata__.modified_class()
        actor.build(lambda rank, _: Learner(rank), rank, (LOCALHOST, 1), torch.get_num_threads())
        yield actor


def test_every_rank_computes_and_rank_0_alone_answers():
    actors = list(made())
    answers = [actor.call("statistics", 4) for actor in actors]
    assert [actor.learner.calls for actor in actors] == [1, 1, 1]
    assert answers[0]["entropy"].shape == (4,)
    assert answers[1:] == [None, None]


@pytest.mark.parametrize("targets", [3, SENT_BYTES // 4])
def test_every_rank_is_given_its_share_and_a_large_one_lies_in_shared_memory_once(targets, monkeypatch):
    """Four ranks, two of which hold each share."""
    monkeypatch.setattr(ray, "put", lambda share: ("put", share))
    learner = RayLearner.__new__(RayLearner)
    learner.dealer = Dealer(Cut(max_rows=1), ranks=2, updates=1)
    learner.ranks, learner.data_parallel_ranks = ["a", "b", "c", "d"], [0, 0, 1, 1]
    batch = distinct([(1, targets)] * 2)
    given, places = learner._shared(batch, for_update=True)
    assert [(starts.tolist(), counts.tolist()) for starts, counts in places] == [
        ([0], [targets]),
        ([targets], [targets]),
    ]
    assert [rank for rank, _ in given] == learner.ranks
    shares = [share for _, share in given]
    assert [[id(each) for each in shares].index(id(share)) for share in shares] == [0, 0, 2, 2]
    large = targets > 3
    assert all(isinstance(share, tuple) == large for share in shares)
    assert all((share[1] if large else share).batch.rows == 1 for share in shares)


def test_of_what_is_measured_one_rank_answers_for_each_share():
    actors = list(made())
    assert [actor.dealing()[1:] for actor in actors] == [(0, True), (0, False), (1, True)]
    answers = [actor.measure("statistics", 4) for actor in actors]
    assert [actor.learner.calls for actor in actors] == [1, 1, 1]
    assert [answer is None for answer in answers] == [False, True, False]
