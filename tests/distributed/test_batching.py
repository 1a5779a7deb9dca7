"""However rows are cut into micro-batches, packed or not, on whatever ranks: the same loss, gradients, entropy and
log-probs.
"""

from dataclasses import replace
from functools import cache

import batching_ranks
import megatron_ranks as ranks
import numpy as np
import pytest
import tiny_models
import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.types import Prompt, joined
from tests.unit.pipeline.monitoring import run_writer

# A large epsilon keeps Adam from turning the last bit of a tiny gradient into a whole step.
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
TOKENS = {"max_tokens_per_micro_batch": 24}  # rows have 5 to 11 input tokens
PACKED = TOKENS | {"packing": True}
WHOLE = {"micro_batch_size": 10}  # every row at once, padded to the longest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def write(name):
        config = tiny_models.config(name)
        # Smaller weights: with saturated attention float32 itself is not good for 1e-6.
        tensors = {key: value if "norm" in key else value / 4 for key, value in tiny_models.weights(config).items()}
        return tiny_models.write(tmp_path_factory.mktemp(name), config, tensors)

    return {name: write(name) for name in ("llama_tied", "qwen3", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3")}


@pytest.fixture(scope="module")
def reference(gang, folders):
    """Batches for a model and what one process makes of them, all rows at once; computed once."""

    @cache
    def result(name):
        plain = [ranks.batch(seed=seed) for seed in (0, 1)]
        now = gang.run(batching_ranks.log_probs, 1, folders[name], plain, WHOLE)[0]
        # Near the policy, as in training: exp() of a large difference would magnify the last bit.
        near = [[lp + 0.1 * torch.randn(lp.shape, generator=seeded(i)) for i in (1, 2)] for lp in now]
        batches = [
            replace(rows, old_log_probs=old, reference_log_probs=kept)
            for rows, (old, kept) in zip(plain, near, strict=True)
        ]
        return batches, run(gang, folders[name], 1, 1, 1, batches, WHOLE)[0]

    return result


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def run(gang, folder, world, tp, pp, batches, config):
    config = {"objective": ObjectiveConfig(kl_coef=0.1), "optimizer": ADAM, **config}
    return gang.run(batching_ranks.train, world, folder, tp, pp, batches, config)


CASES = {
    "by rows": ("qwen3", 1, 1, 1, {"micro_batch_size": 3}),
    "by tokens": ("qwen3", 1, 1, 1, TOKENS),
    "packed": ("qwen3", 1, 1, 1, PACKED),
    "packed into one": ("llama_tied", 1, 1, 1, PACKED | {"max_tokens_per_micro_batch": 1000}),
    "one row at a time": ("qwen3", 1, 1, 1, PACKED | {"max_tokens_per_micro_batch": 12}),
    "by tokens, rows padded to a multiple of 8": ("qwen3", 1, 1, 1, TOKENS | {"align": 8}),
    "packed, padded to a multiple of 8": ("qwen3", 1, 1, 1, PACKED | {"align": 8}),
    "experts, by tokens": ("qwen3_moe", 1, 1, 1, TOKENS),
    "experts, packed": ("qwen3_moe", 1, 1, 1, PACKED),
    "delta nets, packed": ("qwen3_next", 1, 1, 1, PACKED),
    "delta nets, TP2 x SP, by tokens": ("qwen3_next", 2, 2, 1, TOKENS | {"sequence_parallel": True}),
    "delta nets, TP4 x SP, two ranks per key-value head": ("qwen3_next", 4, 4, 1, TOKENS | {"sequence_parallel": True}),
    "delta nets, PP2, by tokens": ("qwen3_next", 2, 1, 2, TOKENS),
    "delta nets, PP2 x VPP2, packed": ("qwen3_next", 2, 1, 2, PACKED | {"sizes": {"vpp": 2}}),
    "delta nets, EP2, packed": ("qwen3_next", 2, 1, 1, PACKED | {"sizes": {"ep": 2}}),
    "sinks and windows, packed": ("gpt_oss", 1, 1, 1, PACKED),
    "sinks and windows, CP2 x PP2 x VPP2, packed": ("gpt_oss", 4, 1, 2, PACKED | {"cp": 2, "sizes": {"vpp": 2}}),
    "sinks and windows, CP2 x TP2 x SP, EP2, by tokens": (
        "gpt_oss",
        4,
        2,
        1,
        TOKENS | {"cp": 2, "sizes": {"ep": 2, "etp": 1}, "sequence_parallel": True},
    ),
    "sinks and windows, TP2 x SP, by tokens": (
        "gpt_oss",
        2,
        2,
        1,
        TOKENS | {"sizes": {"etp": 1}, "sequence_parallel": True},
    ),
    "latent attention, by tokens": ("deepseek_v3", 1, 1, 1, TOKENS),
    "latent attention, packed": ("deepseek_v3", 1, 1, 1, PACKED),
    "TP2, by tokens": ("qwen3", 2, 2, 1, TOKENS),
    "TP2, packed": ("qwen3", 2, 2, 1, PACKED),
    "PP2, by tokens": ("llama_tied", 2, 1, 2, TOKENS),
    "DP2, by tokens": ("qwen3", 2, 1, 1, TOKENS),
    "DP2 x PP2, packed": ("qwen3", 4, 1, 2, PACKED),
    "CP2, latent attention, packed, padded further": ("deepseek_v3", 2, 1, 1, PACKED | {"cp": 2, "align": 2}),
    "CP3, packed": ("llama_tied", 3, 1, 1, PACKED | {"cp": 3}),
    "CP2 x TP2 x SP, packed": ("qwen3", 4, 2, 1, PACKED | {"cp": 2, "sequence_parallel": True}),
    "CP2 x PP2 x VPP2, packed": ("llama_tied", 4, 1, 2, PACKED | {"cp": 2, "sizes": {"vpp": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_how_rows_are_cut_changes_nothing(gang, folders, reference, case):
    name, world, tp, pp, config = CASES[case]
    batches, (log_probs, gradients, stats, weights) = reference(name)
    results = run(gang, folders[name], world, tp, pp, batches, config)
    for got_log_probs, *_ in results:
        assert relative(got_log_probs, log_probs) <= 1e-6
    _, got_gradients, got_stats, got_weights = results[0]
    # The l2 norms of a delta net's small queries and keys magnify the last bit.
    near = 3e-6 if name == "qwen3_next" else 1e-6
    assert relative(flat(got_gradients), flat(gradients)) <= near
    for key, gradient in gradients.items():  # a small one that is wrong hardly shows in the whole
        assert (got_gradients[key] - gradient).norm() <= 2e-5 * gradient.norm(), key
    for got, expected in zip(got_stats, stats, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-6, abs=1e-6)
        assert got.entropy.mean == pytest.approx(expected.entropy.mean, rel=1e-6)
        assert got.entropy.count == expected.entropy.count
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert (got.metrics["padding_fraction"] == 0) == (
            config.get("packing", False) and not {"align", "cp"} & set(config)
        )
        assert [s.metrics for s in got_stats] == [s.metrics for s in results[-1][2]]
    assert relative(flat(got_weights), flat(weights)) <= near


def shaped_batch(log_probs):
    """Single tokens with advantages, weights and marks of their own, off-policy."""
    rows, g = ranks.batch(), seeded(5)
    grid = log_probs.shape
    return replace(
        rows,
        old_log_probs=log_probs + 0.2 * torch.randn(grid, generator=g),
        token_advantages=torch.randn(grid, generator=g),
        token_weights=2 * torch.rand(grid, generator=g),
        marks=torch.randint(0, 3, grid, generator=g, dtype=torch.uint8),
    )


def rollouts():
    """Three responses of uneven length: fewer than four, so that some ranks have none."""
    g, drawn = seeded(6), []
    for number, (prompt, response) in enumerate([(3, 9), (5, 1), (2, 4)]):
        tokens = torch.randint(0, 37, (prompt + response,), generator=g).tolist()
        sample = run_writer.sample(tokens=response, temperature=1.3)
        asked = Prompt(str(number), tuple(tokens[:prompt]), "", None, "exact")
        drawn.append((asked, replace(sample, token_ids=np.array(tokens[prompt:]))))
    return drawn


def exact_entropies(folder, drawn):
    """Of each rollout's tokens by transformers: sum of -p log p over the vocabulary, in float64."""
    model = tiny_models.hf_model(folder).double()
    for prompt, sample in drawn:
        tokens = torch.tensor([[*prompt.token_ids, *sample.token_ids.tolist()]])
        with torch.no_grad():
            logits = model(tokens).logits[0, len(prompt.token_ids) - 1 : -1]
        yield torch.special.entr(logits.softmax(-1)).sum(-1)


@pytest.mark.parametrize(
    ("loss", "world", "tp", "pp", "config"),
    [
        ("htpo", 1, 1, 1, {"micro_batch_size": 1}),
        ("kl_cov", 2, 2, 1, TOKENS),
        ("gspo", 2, 1, 1, PACKED),
        ("htpo", 2, 1, 2, TOKENS),
        ("gspo", 2, 1, 1, {"cp": 2, "micro_batch_size": 4}),
        ("cispo", 2, 2, 1, {"log_prob_kernel": "torch", "micro_batch_size": 3}),
    ],
)
def test_statistics_and_shaped_tokens_are_the_same_in_every_layout(gang, folders, loss, world, tp, pp, config):
    folder = folders["qwen3"]
    log_probs = gang.run(batching_ranks.log_probs, 1, folder, [ranks.batch()], WHOLE)[0][0]
    rows, objective = shaped_batch(log_probs), {"objective": ObjectiveConfig(loss=loss)}
    shown = rollouts()
    ((whole, gradients, _),) = gang.run(batching_ranks.shaped, 1, folder, 1, 1, rows, shown, WHOLE | objective)
    assert list(whole) == ["log_probs", "entropy", "moment"]
    assert relative(whole["log_probs"], log_probs) <= 1e-6
    entropies = list(exact_entropies(folder, shown))
    for statistics, got, kept in gang.run(
        batching_ranks.shaped, world, folder, tp, pp, rows, shown, config | objective
    ):
        for name, grid in whole.items():
            assert relative(statistics[name], grid) <= 1e-5
        assert relative(flat(got), flat(gradients)) <= 1e-5
        for sample, exact in zip(kept, entropies, strict=True):
            np.testing.assert_allclose(sample.entropies, exact, rtol=1e-5)


def relative(got, expected):
    """Length of the difference, as a part of the length."""
    return ((got - expected).norm() / expected.norm()).item()


def flat(tensors):
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def test_metrics_say_what_was_computed(gang, folders):
    """Rows of 5 to 11 input tokens, as a grid, one by one and packed."""
    rows = [ranks.batch()]
    real = int((rows[0].lengths - 1).sum())
    whole, single, packed = (
        run(gang, folders["qwen3"], 1, 1, 1, rows, config)[0][2][0].metrics
        for config in (WHOLE, {"micro_batch_size": 1}, PACKED | {"max_tokens_per_micro_batch": 1000})
    )
    assert whole["tokens_per_micro_batch"] == 110
    assert whole["padding_fraction"] == pytest.approx(1 - real / 110)
    assert single["tokens_per_micro_batch"] == pytest.approx(real / 10)
    assert single["padding_fraction"] == 0
    assert (packed["tokens_per_micro_batch"], packed["padding_fraction"]) == (real, 0)


def test_a_row_beyond_the_budget_is_refused(gang, folders):
    said = gang.run(batching_ranks.too_long, 1, folders["qwen3"])[0]
    assert "learner.max_tokens_per_micro_batch=5 cannot hold a row of" in said


def test_statistics_move_no_more_than_their_rows(gang, folders):
    """The loss mask crosses to the device by the micro-batch, however many there are; a grid is pickled alone."""
    config = {"micro_batch_size": 1}
    moved, pickled, size = gang.run(batching_ranks.traffic, 1, folders["qwen3"], config)[0]
    assert (
        0 < moved <= 2 * len(ranks.batch().tokens) + 2 * 10
    )  # with the rows, as the model's targets; flags of the rows
    assert pickled < 1.5 * size + 2000


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 2)])
def test_a_rank_measures_its_own_rows_and_one_speaks_for_each_share(gang, folders, world, tp, pp):
    """To the bit what the whole batch gives, and no grid of the whole is summed over ranks."""
    config = {"micro_batch_size": 3}
    answers = gang.run(batching_ranks.measured, world, folders["qwen3"], tp, pp, config)
    whole, _, places, *_ = answers[0]
    parts = {own: part for _, part, _, own, speaks, _ in answers if speaks}
    assert sorted(parts) == list(range(world // (tp * pp)))
    assert sum(speaks for *_, speaks, _ in answers) == len(parts)
    for name, values in whole.items():
        assert torch.equal(joined([parts[own][name] for own in sorted(parts)], places), values)
        assert all(torch.equal(other[name], values) for other, *_ in answers)
    if tp == 1:  # tensor-parallel ranks sum activations
        every = 3 * len(ranks.batch().behavior_log_probs)
        assert all(summed in ((every, 0), (2 * every, 0)) for *_, summed in answers)
