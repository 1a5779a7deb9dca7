"""Routing replay: tokens go to the experts of their sample's routes, in every layout, pass and recomputation."""

from dataclasses import replace
from functools import cache

import megatron_ranks as ranks
import pytest
import routing_ranks
import tiny_models
import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.model import architecture
from pipeline.rollout.native.engine import NativeEngine
from pipeline.step.batch import rows_to_measure
from pipeline.types import GenerateRequest, Prompt, TrainBatch

ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
FULL = {"recompute_granularity": "full"}
SP = {"sequence_parallel": True}
PACKED = {"packing": True, "max_tokens_per_micro_batch": 40}


def routed(rows: TrainBatch, model: architecture.Architecture, seed: int = 0, *, holes: bool = True) -> TrainBatch:
    """``rows`` with experts by the throw of a die; a row's last token has none, and with ``holes`` every eighth."""
    moe, tokens = model.moe, len(rows.tokens)
    scores = torch.rand(tokens, sum(moe.layers), moe.experts, generator=torch.Generator().manual_seed(seed))
    routes = scores.topk(moe.top_k).indices.to(torch.uint8)
    routes[rows.lengths.cumsum(0) - 1] = 0
    if holes:
        routes[::8] = 0
    return replace(rows, routes=routes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    @cache
    def made(name):
        folder = tiny_models.write(tmp_path_factory.mktemp(name), tiny_models.config(name))
        return folder, architecture.read(folder)

    return made


@pytest.fixture(scope="module")
def alone(gang, model):
    """What one process computes by routes."""

    @cache
    def result(name):
        return run(gang, *model(name), 1, 1, 1)[0]

    return result


def run(gang, folder, model, world, tp, pp, **config):
    old = {"old_log_probs": -3 * torch.rand(10, 11, generator=torch.Generator().manual_seed(1))}
    batches = [routed(ranks.batch(seed=seed, **old), model, seed) for seed in range(2)]
    return gang.run(ranks.train, world, folder, tp, pp, 2, batches, {"optimizer": ADAM, **config})


LAYOUTS = {
    "TP2 x SP": ((2, 2, 1, SP), "qwen3_moe"),
    "PP2 x VPP2, full recompute, micro-batches of 2": (
        (2, 1, 2, {"sizes": {"vpp": 2}, "micro_batch_size": 2, **FULL}),
        "qwen3_moe",
    ),
    "PP2, recompute of a block, micro-batches of 2": (
        (2, 1, 2, {"micro_batch_size": 2, "recompute_method": "block", "recompute_num_layers": 1, **FULL}),
        "deepseek_v3",
    ),
    "EP2": ((2, 1, 1, {"sizes": {"ep": 2}}), "deepseek_v3"),
    "CP2": ((2, 1, 1, {"cp": 2}), "qwen3_moe"),
    "CP2 x TP2 x SP, EP2": ((4, 2, 1, {"cp": 2, "sizes": {"ep": 2, "etp": 1}, **SP}), "deepseek_v3"),
    "CP2 x EP2, packed, full recompute": ((2, 1, 1, {"cp": 2, "sizes": {"ep": 2}, **PACKED, **FULL}), "qwen3_moe"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_and_recomputation_change_nothing(gang, model, alone, layout):
    (world, tp, pp, config), name = LAYOUTS[layout]
    gradients, stats, weights = alone(name)
    for got_gradients, got_stats, got_weights in run(gang, *model(name), world, tp, pp, **config):
        for key, gradient in gradients.items():
            assert (got_gradients[key] - gradient).abs().max() <= 5e-5 * gradient.abs().max(), key
        for got, expected in zip(got_stats, stats, strict=True):
            assert got.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
            assert got.entropy.mean == pytest.approx(expected.entropy.mean, rel=1e-5)
        assert all(torch.allclose(got_weights[key], weight, rtol=0, atol=1e-5) for key, weight in weights.items())


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_raw", "deepseek_v3"])
def test_tokens_go_where_routes_say_and_the_router_learns(gang, model, name):
    """One row, so that the order is that of its tokens; of zeros the router chooses. What it chose, replayed,
    changes nothing.
    """
    folder, read = model(name)
    rows = routed(ranks.batch(1, 0), read)
    (log_probs, experts, gradients), (own_log_probs, own, own_gradients) = gang.run(
        routing_ranks.chosen, 1, folder, rows, {}
    )[0]
    inputs = rows.routes[:-1].long()
    given = torch.zeros(*inputs.shape[:2], read.moe.experts, dtype=torch.bool).scatter(2, inputs, True)
    known = inputs.any(-1)
    assert torch.equal(experts[known], given[known])
    assert (experts.sum(-1) == read.moe.top_k).all()
    assert not torch.equal(experts, own)
    assert not torch.allclose(log_probs, own_log_probs, atol=1e-3)
    routers = [key for key in gradients if key.endswith("mlp.gate.weight")]
    assert len(routers) == sum(read.moe.layers)
    assert all(gradients[key].any() for key in routers)
    choice = own.long().argsort(dim=-1, descending=True, stable=True)[..., : read.moe.top_k].to(torch.uint8)
    again = replace(rows, routes=torch.cat([choice, torch.zeros_like(choice[:1])]))
    (log_probs, _, gradients), _ = gang.run(routing_ranks.chosen, 1, folder, again, {})[0]
    assert torch.allclose(log_probs, own_log_probs, rtol=0, atol=1e-6)  # experts of a token are summed in their order
    assert all(torch.allclose(gradients[key], own_gradients[key], rtol=0, atol=1e-6) for key in gradients)


def test_replay_takes_the_choice_of_experts_out_of_the_mismatch(gang, tmp_path):
    """The native engine computes with weights in bfloat16, the learner in float32; nothing else differs."""
    config = tiny_models.config("qwen3_moe", num_experts=8, mlp_only_layers=[], num_hidden_layers=6)
    folder = tiny_models.write(tmp_path / "learner", config)
    rounded = {name: tensor.bfloat16().float() for name, tensor in tiny_models.weights(config).items()}
    engine = NativeEngine(eos_token_ids=(), record_routes=True)
    engine.start(tiny_models.write(tmp_path / "engine", config, rounded))
    prompts = [Prompt(str(n), tuple(range(1, n + 2)), "", None, "exact") for n in range(8)]
    groups = engine.generate([GenerateRequest(prompt, tuple(range(8)), 1.0, 48) for prompt in prompts])
    rows = rows_to_measure([(group.prompt, sample) for group in groups for sample in group.samples])
    replayed, chosen, *reference = gang.run(
        routing_ranks.log_probs, 1, folder, rows, {"objective": ObjectiveConfig(kl_coef=0.1)}
    )[0]
    assert torch.equal(*reference)
    found = {}
    for name, log_probs in (("replayed", replayed), ("chosen", chosen)):
        gap = (log_probs - rows.behavior_log_probs).double()
        found[name] = (gap.abs().mean(), gap.abs().quantile(0.99), (gap.exp() - 1 - gap).mean())
    print({name: [f"{float(value):.2e}" for value in values] for name, values in found.items()})
    assert all(with_ < without / 2 for with_, without in zip(found["replayed"], found["chosen"], strict=True))


@pytest.fixture(scope="module")
def loads(gang, model):
    """Two updates by routes in one process, biases moving."""
    folder, read = model("deepseek_v3")
    rows = routed(ranks.batch(), read, holes=False)
    return rows, gang.run(routing_ranks.health, 1, folder, 1, 1, rows, BIASED)[0]


BIASED = {"optimizer": ADAM, "moe_router_bias_update_rate": 0.125}
WATCHED = {
    "DP2 x PP2, full recompute, micro-batches of 1": ((4, 1, 2), {"micro_batch_size": 1, **FULL}),
    "CP2 x TP2 x SP, EP2": ((4, 2, 1), {"cp": 2, "sizes": {"ep": 2, "etp": 1}, **SP}),
    "packed": ((1, 1, 1), PACKED),
    "CP2, packed": ((2, 1, 1), {"cp": 2, **PACKED}),
}


def test_load_and_biases_follow_from_the_tokens_of_each_expert(model, loads):
    """By hand, from the routes."""
    _, read = model("deepseek_v3")
    rows, (metrics, biases) = loads
    inner = torch.ones(len(rows.tokens), dtype=torch.bool)
    inner[rows.lengths.cumsum(0) - 1] = False
    counts = torch.stack([layer.flatten().bincount(minlength=8) for layer in rows.routes[inner].long().unbind(1)])
    mean = counts.double().mean(1, keepdim=True)
    load = (counts / mean).max(1).values.tolist()
    layers = [layer for layer, experts in enumerate(read.moe.layers) if experts]
    by_hand = {f"router_load_{layer}": value for layer, value in zip(layers, load, strict=True)}
    by_hand |= {"router_load_max": max(load), "router_load_mean": sum(load) / len(load)}
    for step in range(2):
        assert {name: v for name, v in metrics[step].items() if name.startswith("router")} == pytest.approx(by_hand)
    loaded = tiny_models.weights(tiny_models.config("deepseek_v3"))
    for column, layer in enumerate(layers):
        before = loaded[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        moved = 2 * 0.125 * (mean[column] - counts[column]).sign().float()
        assert moved.any()
        assert torch.allclose(biases[f"decoder.layers.{layer}.mlp.router.expert_bias"], before + moved, atol=1e-6)


@pytest.mark.parametrize("layout", WATCHED)
def test_no_layout_counts_a_token_twice(gang, model, loads, layout):
    """Nor padding, nor a token whose layer is computed again."""
    rows, (metrics, biases) = loads
    (world, tp, pp), config = WATCHED[layout]
    for got, moved in gang.run(routing_ranks.health, world, model("deepseek_v3")[0], tp, pp, rows, BIASED | config):
        for step in range(2):
            watched = {name: value for name, value in metrics[step].items() if name.startswith("router")}
            assert {name: got[step][name] for name in watched} == pytest.approx(watched, rel=1e-12)
        assert all(torch.equal(moved[name], biases[name]) for name in moved)


def test_z_loss_is_that_of_transformers_router_logits(gang, model):
    """Rows of one length, so that nothing is padding: the gradient is that of the mean square of logsumexp, summed over
    layers.
    """
    folder, _ = model("qwen3_moe")
    rows = ranks.batch(4, 0, lengths=torch.full((4,), 12), loss_mask=torch.ones(4, 11, dtype=torch.bool))
    plain, penalised = gang.run(routing_ranks.gradients, 1, folder, rows, [{}, {"moe_z_loss_coeff": 0.5}])[0]
    theirs = tiny_models.hf_model(folder)
    logits = theirs(rows.tokens.view(4, 12)[:, :-1].long(), output_router_logits=True).router_logits
    (0.5 * sum(layer.logsumexp(-1).square().mean() for layer in logits)).backward()
    shared = [(name, each) for name, each in theirs.named_parameters() if name in plain]  # it joins the experts
    assert len(shared) > 4 * 8
    for name, parameter in shared:
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(1e-3, expected.abs().max(), plain[name].abs().max())
        assert (penalised[name] - plain[name] - expected).abs().max() <= 1e-4 * scale, name
    assert theirs.model.layers[0].mlp.gate.weight.grad.any()


def test_an_update_without_routes_is_refused(gang, model):
    folder, _ = model("qwen3_moe")
    assert "routing_replay=routes: the samples carry no routes" in gang.run(routing_ranks.refusal, 1, folder)[0]
