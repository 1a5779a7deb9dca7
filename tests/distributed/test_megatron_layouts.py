"""A layout changes where a model is computed, never what: loss, gradients, entropy and updated weights equal one
process's.
"""

import math
from functools import cache

import megatron_ranks as ranks
import pytest
import tiny_models
import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.types import Actuation
from tests.grids import grid_of, mask_of, tokens_of

# A large epsilon keeps Adam from turning the last bit of a tiny gradient into a whole step.
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
STEPS = 3


def batches():
    def log_probs(seed):
        return -3 * torch.rand(10, 11, generator=torch.Generator().manual_seed(seed))

    old = {"old_log_probs": log_probs(1), "reference_log_probs": log_probs(2)}
    return [
        ranks.batch(seed=0, **old),
        ranks.batch(seed=1, auxiliary=0, actuation=Actuation("entropy_bonus", 0.3, 0.0), **old),
        ranks.batch(
            seed=2,
            auxiliary=0,
            actuation=Actuation("reweight", 1.4, 1.0),
            positive_weights=torch.full((10,), 0.02),
            **old,
        ),
    ]


@pytest.fixture(scope="module")
def reference(gang, tmp_path_factory):
    """Folder and one-process result of a model, computed once."""

    @cache
    def result(name, **config):
        folder = tiny_models.write(tmp_path_factory.mktemp(name), tiny_models.config(name))
        return folder, run(gang, folder, 1, 1, 1, train=ranks.train_and_ask)[0]

    return result


def run(gang, folder, world, tp, pp, train=ranks.train, **config):
    config = {"objective": ObjectiveConfig(kl_coef=0.1), "optimizer": ADAM, **config}
    return gang.run(train, world, folder, tp, pp, STEPS, batches(), config)


DISTRIBUTED = {"optimizer": {**ADAM, "distributed": True}}
OVERLAP = {"optimizer": {**ADAM, "distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}
SP = {"sequence_parallel": True}
DENSE = ("llama", "qwen2", "qwen3")  # qwen2: tied embeddings and biases; qwen3: norms of queries and keys


def vpp(**sizes):
    return {"sizes": {"vpp": 2, **sizes}}


# Layout: (processes, TP, PP, the rest), and the families it is tried with.
LAYOUTS = {
    "TP2": ((2, 2, 1, {}), ("qwen2",)),
    "PP2": ((2, 1, 2, {}), ("llama",)),
    "DP2": ((2, 1, 1, {}), ("qwen3_moe",)),
    "DP2, distributed optimizer, overlap": ((2, 1, 1, OVERLAP), ("qwen3",)),
    "DP2, overlap of gradients": ((2, 1, 1, {"optimizer": {**ADAM, "overlap_grad_reduce": True}}), ("llama",)),
    "TP2 x PP2": ((4, 2, 2, {}), DENSE),
    "micro-batches of 3": ((1, 1, 1, {"micro_batch_size": 3}), ("qwen2",)),
    "DP2 x PP2, micro-batches of 2": ((4, 1, 2, {"micro_batch_size": 2}), ("llama",)),
    "TP2 x SP x PP2": ((4, 2, 2, SP), ("qwen2",)),
    "TP4 x SP, two ranks per key-value head": ((4, 4, 1, SP), ("qwen3",)),
    "PP2 x VPP2": ((2, 1, 2, vpp()), ("qwen3", "deepseek_v3")),
    "DP2 x PP2 x VPP2, overlap": ((4, 1, 2, {"micro_batch_size": 1, **vpp(), **OVERLAP}), ("qwen2",)),
    "PP3, uneven": ((3, 1, 3, {"sizes": {"first": 1, "last": 1}}), ("qwen2",)),
    "CP2": ((2, 1, 1, {"cp": 2}), ("llama",)),
    "CP2 x TP2 x SP": ((4, 2, 1, {"cp": 2, **SP}), ("qwen3",)),
    "CP2 x PP2 x VPP2, distributed optimizer": ((4, 1, 2, {"cp": 2, **vpp(), **DISTRIBUTED}), ("qwen2",)),
    "full recompute, PP2": ((2, 1, 2, {"recompute_granularity": "full"}), ("qwen2",)),
    "full recompute of blocks": (
        (1, 1, 1, {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}),
        ("qwen3_moe",),
    ),
    "selective recompute, CP2": ((2, 1, 1, {"cp": 2, "recompute_granularity": "selective"}), ("qwen3", "deepseek_v3")),
    "EP2, distributed optimizer, overlap": ((2, 1, 1, {"sizes": {"ep": 2}, **OVERLAP}), ("qwen3_moe",)),
    "TP2 x SP": ((2, 2, 1, SP), ("deepseek_v3",)),
    "TP2 x SP, whole experts": ((2, 2, 1, {"sizes": {"etp": 1}, **SP}), ("qwen3_moe",)),
    "expert-TP2": ((2, 1, 1, {"sizes": {"etp": 2}}), ("qwen3_moe",)),
    "TP2 x SP x DP2, EP2 x expert-TP2": ((4, 2, 1, {"sizes": {"ep": 2, "etp": 2}, **SP}), ("qwen3_moe",)),
    "CP2 x TP2 x SP, EP2": ((4, 2, 1, {"cp": 2, "sizes": {"ep": 2, "etp": 1}, **SP}), ("deepseek_v3",)),
    "EP2 x PP2 x VPP2": ((4, 1, 2, vpp(ep=2)), ("qwen3_moe",)),
    "TP2 x SP x PP2, no experts in the first": ((4, 2, 2, SP), ("deepseek_plain_query",)),
    "logits kept whole": ((1, 1, 1, {"log_prob_kernel": "torch"}), ("qwen2",)),
    "TP2 x SP, logits kept whole": ((2, 2, 1, {"log_prob_kernel": "torch", **SP}), ("llama",)),
}


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for layout, (_, names) in LAYOUTS.items() for name in names]
)
def test_layout_changes_nothing(gang, reference, name, layout):
    folder, (gradients, stats, weights, log_probs) = reference(name)
    (world, tp, pp, config), _ = LAYOUTS[layout]
    results = run(gang, folder, world, tp, pp, train=ranks.train_and_ask, **config)
    got_gradients, got_stats, got_weights, _ = results[0]
    for rank in range(world):
        assert [(s.loss, s.entropy, s.metrics, s.grad_norm) for s in results[rank][1]] == [
            (s.loss, s.entropy, s.metrics, s.grad_norm) for s in got_stats
        ]
        before, after, reference_after = results[rank][3]
        assert torch.equal(reference_after, before)
        assert torch.allclose(before, log_probs[0], rtol=0, atol=2e-5)
        assert torch.allclose(after, log_probs[1], rtol=0, atol=3e-4)  # of weights that differ in their last digits
    # Experts that few tokens reach have small gradients, of which float32 leaves fewer digits.
    tolerance = 1e-5 if name in DENSE else 5e-5
    for key, gradient in gradients.items():
        assert (got_gradients[key] - gradient).abs().max() <= tolerance * gradient.abs().max(), key
    for got, expected in zip(got_stats, stats, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
        assert got.entropy.mean == pytest.approx(expected.entropy.mean, rel=1e-5)
        assert got.entropy.count == expected.entropy.count
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert got.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    for key, weight in weights.items():
        assert torch.allclose(got_weights[key], weight, rtol=0, atol=1e-5), key


def test_expert_biases_stay_as_loaded(reference):
    """Upstream moves them toward balance after every step, by counts of which padding is a part."""
    _, (_, _, weights, _) = reference("deepseek_v3")
    loaded = tiny_models.weights(tiny_models.config("deepseek_v3"))
    biases = [key for key in loaded if key.endswith("e_score_correction_bias")]
    assert biases
    assert all(torch.equal(weights[key], loaded[key]) for key in biases)
    assert not torch.equal(weights["model.norm.weight"], loaded["model.norm.weight"])


def test_recompute_keeps_fewer_activations(gang, reference):
    """By hand, per layer with full recompute: its input, [seq, rows, hidden] of float32."""
    folder, _ = reference("qwen3")
    configs = [{"recompute_granularity": granularity} for granularity in ("none", "selective", "full")]
    tokens = torch.zeros(2, 48, dtype=torch.long)
    nothing, attention, layers = gang.run(ranks.saved_for_backward, 1, folder, configs, tokens)[0]
    probabilities = 4 * 2 * 4 * 48 * 48 * 4  # layers x rows x heads x seq x seq
    assert nothing - attention >= probabilities
    assert layers < nothing / 4
    assert layers >= 4 * 48 * 2 * 32 * 4


def test_gradient_is_that_of_plain_torch(reference):
    """The whole chain against autograd through transformers: loss = sum of weight x surrogate + KL over rows and
    tokens.
    """
    folder, (gradients, stats, *_) = reference("qwen3")
    batch = batches()[0]
    model = tiny_models.hf_model(folder)
    tokens, mask = tokens_of(batch), mask_of(batch)
    logits = model(tokens[:, :-1]).logits
    log_probs = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
    old, kept = (grid_of(flat, batch) for flat in (batch.old_log_probs, batch.reference_log_probs))
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    advantage = torch.where(batch.auxiliary, 1.0, batch.advantages)[:, None]
    gap = kept - log_probs
    kl = 0.1 * (gap.exp() - gap - 1) * ~batch.auxiliary[:, None]
    term = -torch.minimum(ratio * advantage, clipped * advantage) + kl
    loss = (batch.weights[:, None] * term * mask).sum()
    loss.backward()
    assert stats[0].loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max(), name


def test_mini_batches_add_up_to_the_batch(gang, reference):
    """With a learning rate of 0 the mean over mini-batches is the whole batch; with one, layouts still agree."""
    folder, _ = reference("llama")
    still = {**ADAM, "lr": 0.0}
    (_, (whole, *_), _), *_ = run(gang, folder, 1, 1, 1, optimizer=still)
    (_, (parts, *_), _), *_ = run(gang, folder, 1, 1, 1, optimizer=still, updates_per_step=3)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.entropy.sum == pytest.approx(whole.entropy.sum, rel=1e-5)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5, abs=1e-6)
    (_, one, weights), *_ = run(gang, folder, 1, 1, 1, updates_per_step=2)
    (_, two, split), *_ = run(gang, folder, 2, 2, 1, updates_per_step=2)
    assert [s.loss for s in two] == pytest.approx([s.loss for s in one], rel=1e-5, abs=1e-6)
    # Twice the tolerance of one update a step: off-policy ratios make losses of 100 here, and rounding in proportion.
    assert all(torch.allclose(split[name], weights[name], rtol=0, atol=2e-5) for name in weights)
    assert not math.isclose(one[-1].loss, whole.loss)


def test_reference_log_probs_are_those_of_the_loaded_weights(gang, reference):
    """Before any update policy and reference agree; after one only the reference still says what it said."""
    folder, _ = reference("qwen2")
    for before, at_load, after, kept in gang.run(ranks.reference_policy, 2, folder):
        assert torch.equal(before, at_load)
        assert torch.equal(kept, at_load)
        assert not torch.equal(after, before)


def test_learning_rate_schedule(gang, reference):
    """Warm-up over 2 of 4 updates, then linear: points 1 to 4 of 5."""
    folder, _ = reference("llama")
    linear = {"lr": 1e-3, "lr_schedule": "linear", "warmup_steps": 2}
    rates = gang.run(ranks.learning_rates, 1, folder, linear, 4)[0]
    assert rates == pytest.approx([0.5e-3, 1e-3, 2 / 3 * 1e-3, 1 / 3 * 1e-3])
    cosine = {"lr": 1e-3, "min_lr": 1e-4, "lr_schedule": "cosine"}
    rates = gang.run(ranks.learning_rates, 1, folder, cosine, 3)[0]
    assert rates == pytest.approx([1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3)])


def test_refusals_say_what_to_do(gang, reference):
    folder, _ = reference("llama")
    said, untouched = gang.run(ranks.messages, 1, folder)[0]
    assert "objective.kl_coef" in said["reference"]
    assert "needs old_log_probs" in said["old_log_probs"]
    assert "learner.updates_per_step=2 needs at least as many main rows; the batch has 1" in said["mini_batches"]
    assert said["nan"].startswith("FloatingPointError: step 5: loss is nan")
    assert said["huge"].startswith("FloatingPointError: step 6: gradient norm is inf")
    assert untouched


@pytest.mark.parametrize(
    ("tp", "pp", "config"),
    [(1, 1, {"optimizer": {**ADAM, "distributed": True}}), (1, 2, {"dtype": "bf16"}), (2, 1, {})],
    ids=["DP2, distributed optimizer", "PP2, bf16", "TP2"],
)
def test_one_rank_s_bad_gradient_stops_all_and_changes_nothing(gang, reference, tp, pp, config):
    """The loss is finite, and the learner as good as new afterwards: weights, moments and step count."""
    folder, _ = reference("llama")
    for said, (after, spared) in gang.run(ranks.poisoned_gradient, 2, folder, tp, pp, config):
        assert said.startswith("step 3: gradient norm is nan; that optimizer step was not taken")
        assert all(torch.equal(after[name], spared[name]) for name in spared)
