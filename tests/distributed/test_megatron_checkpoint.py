"""A learner restored from its checkpoint goes on as the one that wrote it, bit for bit."""

from dataclasses import replace

import megatron_ranks as ranks
import pytest
import tiny_models
import torch

from pipeline import fingerprints
from pipeline.config.schema import LoraConfig, ObjectiveConfig

OVERLAP = {"optimizer": {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}
REFERENCE = {"objective": ObjectiveConfig(kl_coef=0.1)}
CASES = {
    "one process, cosine schedule": ("qwen2", 1, 1, 1, {"optimizer": {"lr_schedule": "cosine", "lr": 1e-2}}),
    "TP2 with a reference policy": ("qwen2", 2, 2, 1, REFERENCE),
    "DP2, distributed optimizer": ("qwen2", 2, 1, 1, {"optimizer": {"distributed": True}}),
    "PP2, bf16": ("qwen2", 2, 1, 2, {"dtype": "bf16"}),
    "TP2 x PP2, tied": ("qwen2", 4, 2, 2, {}),
    "DP2 x PP2 x VPP2, tied, distributed optimizer": ("qwen2", 4, 1, 2, {"sizes": {"vpp": 2}, **OVERLAP, **REFERENCE}),
    "CP2, distributed optimizer": ("qwen3", 2, 1, 1, {"cp": 2, **OVERLAP}),
    "TP2 x SP, adapters, with a reference policy": (
        "qwen2",
        2,
        2,
        1,
        {"sequence_parallel": True, "lora": LoraConfig(rank=2), **REFERENCE},
    ),
    "DP2, adapters, bf16, distributed optimizer": (
        "qwen3",
        2,
        1,
        1,
        {"dtype": "bf16", "lora": LoraConfig(rank=2, targets=["q_proj", "down_proj"]), **OVERLAP},
    ),
    "EP2, latent attention": ("deepseek_v3", 2, 1, 1, {"sizes": {"ep": 2}}),
    "TP2 x SP, EP2, latent attention, adapters, distributed optimizer": (
        "deepseek_v3",
        2,
        2,
        1,
        {"sizes": {"ep": 2, "etp": 1}, "sequence_parallel": True, "lora": LoraConfig(rank=2), **OVERLAP},
    ),
    "TP2 x SP, delta nets": ("qwen3_5", 2, 2, 1, {"sequence_parallel": True}),
    "EP2, delta nets, distributed optimizer": ("qwen3_next", 2, 1, 1, {"sizes": {"ep": 2}, **OVERLAP}),
    "CP2 x TP2 x SP, sinks": ("gpt_oss", 4, 2, 1, {"cp": 2, "sizes": {"etp": 1}, "sequence_parallel": True}),
    "EP2 x PP2, bf16, distributed optimizer": ("qwen3_moe", 4, 1, 2, {"sizes": {"ep": 2}, "dtype": "bf16", **OVERLAP}),
}


# Transformer Engine's optimizer in torch's place, by which kind of megatron's it is wrapped in.
FUSED_CASES = {
    "one process, float32": ("qwen2", 1, 1, 1, {"optimizer": {"lr_schedule": "cosine"}}),
    "PP2, bf16": CASES["PP2, bf16"],
    "DP2, distributed optimizer": CASES["DP2, distributed optimizer"],
    "EP2 x PP2, bf16, distributed optimizer": CASES["EP2 x PP2, bf16, distributed optimizer"],
}


@pytest.mark.parametrize("case", CASES)
def test_continues_bit_for_bit(gang, tmp_path, case):
    continues_bit_for_bit(gang, tmp_path, *CASES[case])


@pytest.mark.parametrize("case", FUSED_CASES)
def test_continues_bit_for_bit_with_fused_adam(gang, tmp_path, case):
    continues_bit_for_bit(gang, tmp_path, *FUSED_CASES[case], wrap=(ranks.with_fused_adam,))


def continues_bit_for_bit(gang, tmp_path, name, world, tp, pp, config, wrap=()):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config(name))
    batches = [ranks.batch(seed=seed, reference_log_probs=-torch.rand(10, 11)) for seed in range(4)]
    first, *rest = (*wrap, ranks.save_and_continue)
    results = gang.run(first, world, *rest, folder, tmp_path / "checkpoint", tp, pp, batches, config)
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


OTHER = {"lr": 2e-3, "min_lr": 1e-4, "lr_schedule": "cosine", "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.3}
OPTIMIZERS = {
    "float32": (1, {}, {}),
    "bf16": (1, {"dtype": "bf16"}, {}),
    "DP2, distributed": (2, {}, {"distributed": True}),
}


@pytest.mark.parametrize("wrap", [(), (ranks.with_fused_adam,)], ids=["AdamW", "FusedAdam"])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_untrained_checkpoint_under_another_configuration(gang, tmp_path, case, wrap):
    """With no update behind it, a learner restored under other hyper-parameters is a new learner of those.

    Bit for bit.
    """
    world, config, more = OPTIMIZERS[case]
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("llama"))
    optimizers = [{"lr": 1e-2, "weight_decay": 0.1, **more}, {**OTHER, **more}]
    restore, update = ((*wrap, function) for function in (ranks.restore_with, ranks.first_update))
    _, restored = gang.run(restore[0], world, *restore[1:], folder, tmp_path / "save", optimizers, 0, config)[0]
    for optimizer, (stats, weights) in zip(optimizers, restored, strict=True):
        new_stats, new_weights = gang.run(update[0], world, *update[1:], folder, optimizer, config)[0]
        assert replace(stats, seconds=0.0) == replace(new_stats, seconds=0.0)
        assert all(torch.equal(weights[name], new_weights[name]) for name in new_weights)


@pytest.mark.parametrize("case", ["float32", "DP2, distributed"])
def test_configured_learning_rate_rules_after_restore(gang, tmp_path, case):
    """From the same trained state the step is proportional to the rate: 1/5 of the rate, 1/5 of the way."""
    world, config, more = OPTIMIZERS[case]
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("llama"))
    optimizers = [{"lr": lr, **more} for lr in (1e-2, 2e-3)]
    weights, results = gang.run(ranks.restore_with, world, folder, tmp_path / "save", optimizers, 2, config)[0]
    (stats, far), (slow_stats, near) = results
    assert (stats.learning_rate, slow_stats.learning_rate) == (1e-2, 2e-3)
    assert (stats.loss, stats.grad_norm) == (slow_stats.loss, slow_stats.grad_norm)
    for name, start in weights.items():
        assert torch.allclose(near[name] - start, (far[name] - start) / 5, rtol=1e-3, atol=1e-6), name
        assert (far[name] - start).abs().max() > 1e-3, name


DAMAGE = {  # file, what is done to it, what is said
    "a flipped bit of rank 1": ("__1_0.distcp", "flip", "checksum"),
    "a truncated file of rank 1": ("__1_0.distcp", "truncate", "bytes, not"),
    "a missing file of rank 0": (".metadata", "remove", "is missing"),
    "a flipped bit of all ranks' file": ("metadata.json", "flip", "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_ranks_refuse_a_damaged_checkpoint_before_they_load_any_of_it(gang, tmp_path, damage):
    """Each rank reads its own files; all say what one found."""
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("qwen2"))
    name, change, what = DAMAGE[damage]
    said, untouched, _ = zip(*gang.run(ranks.restore_damaged, 2, folder, tmp_path / "save", name, change), strict=True)
    assert len(set(said)) == 1
    assert name in said[0]
    assert what in said[0]
    assert all(untouched)


def test_every_rank_writes_its_part_and_knows_what_it_wrote(gang, tmp_path):
    """The parameters that two DP ranks both hold are divided between them, and the optimizer's state is."""
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("qwen2"))
    found = gang.run(ranks.restore_damaged, 2, folder, tmp_path / "save", ".metadata", "remove")
    own = [written for _, _, written in found]
    assert not own[0].keys() & own[1].keys()
    assert own[0].keys() | own[1].keys() == {path.name for path in (tmp_path / "save").iterdir()} | {".metadata"}
    assert own[1].keys() == {"__1_0.distcp"}
    for name, written in {**own[0], **own[1]}.items():
        assert name == ".metadata" or fingerprints.read_back(tmp_path / "save" / name) == written, name
    sizes = [own[rank][f"__{rank}_0.distcp"].bytes for rank in range(2)]
    assert max(sizes) < 1.25 * min(sizes)


def test_another_layout_is_refused(gang, tmp_path):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("llama"))
    said = gang.run(ranks.restore_elsewhere, 2, folder, tmp_path / "checkpoint")
    assert all("'tp': 2, 'pp': 1" in message and "'tp': 1, 'pp': 2" in message for message in said)
