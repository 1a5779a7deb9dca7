"""The mismatch, its quantile and its correction are over the whole batch, however its rows lie on ranks and
micro-batches.
"""

import megatron_ranks as ranks
import pytest
import tiny_models
import torch

from pipeline.config.schema import CorrectionConfig, ObjectiveConfig


def test_layout_changes_nothing(gang, tmp_path):
    """On-policy and off-policy; a whole response has one weight, over CP ranks too.

    In two of the layouts there are dummy rows, too.
    """
    folder = tiny_models.write(tmp_path / "llama", tiny_models.config("llama"))
    around = -4.4 + 1.5 * torch.rand(2, 10, 11, generator=torch.Generator().manual_seed(1))
    batches = [
        ranks.batch(seed=0, behavior_log_probs=around[0]),
        ranks.batch(seed=1, behavior_log_probs=around[0], old_log_probs=around[1]),
    ]
    objective = ObjectiveConfig(correction=CorrectionConfig("mis", "sequence", low=0.7, high=3.0))

    def train(world, tp, pp, micro_batch_size, cp=1):
        config = {"objective": objective, "micro_batch_size": micro_batch_size, "optimizer": {"eps": 1e-3}, "cp": cp}
        return gang.run(ranks.train, world, folder, tp, pp, 2, batches, config)[0]

    gradients, stats, _ = train(1, 1, 1, 10)
    assert all(0 < step.metrics["correction_outside"] < 1 for step in stats)
    for layout in ((1, 1, 1, 3), (2, 1, 1, 3), (2, 1, 1, 3, 2), (4, 2, 2, 4)):
        got_gradients, got_stats, _ = train(*layout)
        for got, expected in zip(got_stats, stats, strict=True):
            assert got.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
            assert got.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
        for name, gradient in gradients.items() if layout[1:3] == (1, 1) else ():
            assert (got_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
