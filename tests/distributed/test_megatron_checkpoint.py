"""A learner restored from its checkpoint goes on as the one that wrote it, bit for bit."""

import megatron_ranks as ranks
import pytest
import tiny_models
import torch

from pipeline.config.schema import ObjectiveConfig

CASES = {
    "one process, cosine schedule": (1, 1, 1, {"optimizer": {"lr_schedule": "cosine", "lr": 1e-2}}),
    "TP2 with a reference policy": (2, 2, 1, {"objective": ObjectiveConfig(kl_coef=0.1)}),
    "DP2, distributed optimizer": (2, 1, 1, {"optimizer": {"distributed": True}}),
    "PP2, bf16": (2, 1, 2, {"dtype": "bf16"}),
    "TP2 x PP2, tied": (4, 2, 2, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_continues_bit_for_bit(gang, tmp_path, case):
    world, tp, pp, config = CASES[case]
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("qwen2"))
    batches = [ranks.batch(seed=seed, reference_log_probs=-torch.rand(10, 11)) for seed in range(4)]
    results = gang.run(ranks.save_and_continue, world, folder, tmp_path / "checkpoint", tp, pp, batches, config)
    for expected, repeated, weights, again, reference, reference_again in results:
        for old, new in zip(expected, repeated, strict=True):
            assert (old.loss, old.entropy, old.grad_norm, old.learning_rate) == (
                new.loss,
                new.entropy,
                new.grad_norm,
                new.learning_rate,
            )
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert reference is None or torch.equal(reference, reference_again)
    assert results[0][0][0].loss != results[0][0][1].loss


def test_another_layout_is_refused(gang, tmp_path):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("llama"))
    said = gang.run(ranks.restore_elsewhere, 2, folder, tmp_path / "checkpoint")
    assert all("'tp': 2, 'pp': 1" in message and "'tp': 1, 'pp': 2" in message for message in said)
