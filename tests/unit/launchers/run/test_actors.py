"""What the actors' classes do, without Ray."""

import torch

from launchers.run.actors import LOCALHOST, LearnerRank


class Learner:
    """Counts its calls and returns a grid."""

    calls = 0

    def statistics(self, rows: int) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"entropy": torch.zeros(rows)}


def test_every_rank_computes_and_rank_0_alone_answers():
    answers = []
    for rank in range(3):
        actor = LearnerRank.__ray_metadata__.modified_class()
        actor.build(lambda *_: Learner(), rank, (LOCALHOST, 1), torch.get_num_threads())
        answers.append(actor.call("statistics", 4))
        assert actor.learner.calls == 1
    assert answers[0]["entropy"].shape == (4,)
    assert answers[1:] == [None, None]
