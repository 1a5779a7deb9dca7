"""Emulated FP8 in the learner: whole RL steps, tensor parallelism, and what a checkpoint must hold."""

import math

import fp8_ranks
import megatron_ranks as ranks
import pytest
import tiny_models
import torch

from pipeline.config.schema import PrecisionConfig

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
# The same numbers, rounded in other places: a scale that is no power of two moves with the last bit of a sum, a
# tensorwise one is of each rank's shard.
CLOSE = {"blockwise": 1e-3, "mxfp8": 1e-3, "delayed": 0.05, "tensorwise": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write(tmp_path_factory.mktemp("llama"), tiny_models.config("llama"))


def precision(recipe, **options):
    return PrecisionConfig(fp8="hybrid", fp8_recipe=recipe, emulate=True, **options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_layers_under_tensor_parallelism(gang, recipe):
    """Exactly equal where every rank's shard begins on a block's edge; sequence parallelism changes nothing in any
    recipe.
    """
    alone, divided, sequence = (
        gang.run(fp8_ranks.two_layers, world, recipe, sp, 2) for world, sp in ((1, False), (2, False), (2, True))
    )
    for tensors in zip(*divided, strict=True):
        assert torch.equal(*tensors)  # gathered or replicated: all ranks have the same
    for found, others in zip(divided[0], sequence[0], strict=True):
        assert torch.allclose(found, others, rtol=0, atol=1e-5 * float(others.abs().max()))
    for found, expected in zip(divided[0], alone[0], strict=True):
        if recipe in ("blockwise", "mxfp8"):
            assert torch.equal(found, expected)
        else:
            error = (found - expected).norm() / expected.norm()
            assert error < (1e-2 if recipe == "delayed" else 0.06)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_at_one_and_two_ranks(gang, folder, recipe):
    """Three updates: finite, near what float32 gives but not it, and TP 2 near TP 1."""
    config = {"optimizer": {"lr": 1e-3, "eps": 1e-3}, "micro_batch_size": 16}
    batches = [ranks.batch(seed=0)]
    (_, exact, _), *_ = gang.run(ranks.train, 1, folder, 1, 1, 3, batches, config)
    config |= {"precision": precision(recipe)}
    (_, one, weights), *_ = gang.run(ranks.train, 1, folder, 1, 1, 3, batches, config)
    (_, two, _), *_ = gang.run(ranks.train, 2, folder, 2, 1, 3, batches, config)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    for emulated, divided, reference in zip(one, two, exact, strict=True):
        assert math.isfinite(emulated.grad_norm)
        assert emulated.entropy.mean != reference.entropy.mean
        assert emulated.entropy.mean == pytest.approx(reference.entropy.mean, rel=0.25)
        assert divided.entropy.mean == pytest.approx(emulated.entropy.mean, rel=CLOSE[recipe])
        assert divided.grad_norm == pytest.approx(emulated.grad_norm, rel=3 * CLOSE[recipe])


def test_delayed_scales_are_part_of_a_checkpoint(gang, folder, tmp_path):
    batches = [ranks.batch(seed=seed) for seed in range(4)]
    config = {"precision": precision("delayed", fp8_amax_history_len=3)}
    for saved in gang.run(ranks.save_and_continue, 2, folder, tmp_path / "c", 2, 1, batches, config):
        expected, repeated, weights, again, *_ = saved
        assert [(s.loss, s.entropy, s.grad_norm) for s in repeated] == [
            (s.loss, s.entropy, s.grad_norm) for s in expected
        ]
        assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("name", "per_layer"),
    [
        ("llama", {1: ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]}),
        (
            "qwen3_moe",
            {
                1: ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"],
                2: ["self_attention.linear_proj", "self_attention.linear_qkv"]
                + [f"mlp.experts.local_experts.{e}.linear_fc{n}" for e in range(4) for n in (1, 2)],
            },
        ),
    ],
)
def test_linear_layers_alone_and_not_the_first_and_last(gang, tmp_path, name, per_layer):
    """Not the output layer, the embedding, the router; layers 1 and 2 of 4."""
    folder = tiny_models.write(tmp_path, tiny_models.config(name))
    names, finite = gang.run(fp8_ranks.emulated_layers, 1, folder, precision("blockwise", first_last_layers_bf16=True))[
        0
    ]
    assert finite
    expected = {layer: per_layer.get(layer, per_layer[1]) for layer in (1, 2)}
    assert sorted(names) == sorted(f"decoder.layers.{layer}.{n}" for layer in expected for n in expected[layer])


def test_padding_to_what_fp8_products_take_changes_nothing(gang, folder):
    """11 positions padded to 16 and to 32, through two pipeline stages."""
    rows = ranks.batch()
    for plain, *others in gang.run(fp8_ranks.padded, 2, folder, (1, 16, 32), rows):
        for log_probs, stats in others:
            assert torch.allclose(log_probs, plain[0], rtol=0, atol=1e-5)
            assert stats.loss == pytest.approx(plain[1].loss, rel=1e-5)
            assert stats.grad_norm == pytest.approx(plain[1].grad_norm, rel=1e-4)
            assert stats.entropy.mean == pytest.approx(plain[1].entropy.mean, rel=1e-5)
