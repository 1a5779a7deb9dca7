"""Importance weights by hand, and what they do to the loss."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import CorrectionConfig, ObjectiveConfig
from pipeline.objectives.correction import importance_weights, metrics
from pipeline.objectives.loss import PolicyOutputs, TokenRows, policy_loss, reduce_metrics
from pipeline.types import Actuation

OFF = ObjectiveConfig()
RATIOS = [0.25, 1.0, 1.5, 4.0]


def corrected(**keys):
    return ObjectiveConfig(correction=CorrectionConfig(**keys))


def weigh(ratios, config, row=None, main=None):
    n = len(ratios)
    row = torch.arange(n) if row is None else torch.tensor(row)
    main = torch.ones(n, dtype=torch.bool) if main is None else torch.tensor(main)
    weights, sums = importance_weights(torch.tensor(ratios).log(), row, main, config)
    return weights.tolist(), metrics({name: float(value) for name, value in sums.items()})


def test_tokens_truncated():
    weights, figures = weigh(RATIOS, CorrectionConfig("tis", high=2.0))
    assert weights == pytest.approx([0.25, 1.0, 1.5, 2.0])
    total, square = 4.75, 0.0625 + 1 + 2.25 + 4
    assert figures == pytest.approx(
        {"correction_weight": total / 4, "correction_outside": 1 / 4, "correction_ess": total**2 / (4 * square)}
    )


def test_tokens_masked():
    weights, figures = weigh(RATIOS, CorrectionConfig("mis", low=0.5, high=2.0))
    assert weights == pytest.approx([0.0, 1.0, 1.5, 0.0])
    assert figures["correction_outside"] == 0.5
    assert figures["correction_weight"] == pytest.approx(2.5 / 4)
    assert figures["correction_ess"] == pytest.approx(2.5**2 / (4 * 3.25))


def test_a_sequence_has_one_weight_and_counts_once():
    """Rows of 3, 2 and 1 tokens: products 1, 3 and 0.25."""
    ratios, row = [2.0, 0.25, 2.0, 1.5, 2.0, 0.25], [0, 0, 0, 2, 2, 5]
    weights, figures = weigh(ratios, CorrectionConfig("tis", "sequence", high=2.0), row)
    assert weights == pytest.approx([1, 1, 1, 2, 2, 0.25])
    assert figures["correction_weight"] == pytest.approx(3.25 / 3)
    assert figures["correction_outside"] == pytest.approx(1 / 3)
    weights, _ = weigh(ratios, CorrectionConfig("mis", "sequence", low=0.5, high=2.0), row)
    assert weights == pytest.approx([1, 1, 1, 0, 0, 0])


def test_all_masked_is_an_effective_sample_of_nothing():
    weights, figures = weigh([5.0, 7.0], CorrectionConfig("mis", high=2.0))
    assert weights == [0, 0]
    assert figures == {"correction_weight": 0, "correction_outside": 1, "correction_ess": 0}


def test_no_main_token():
    weights, figures = weigh([9.0], CorrectionConfig("mis"), main=[False])
    assert weights == [1]
    assert all(math.isnan(value) for value in figures.values())


def test_a_weight_that_overflows_is_truncated_or_masked():
    row, main, huge = torch.arange(1), torch.ones(1, dtype=torch.bool), torch.tensor([1e4])
    assert importance_weights(huge, row, main, CorrectionConfig("tis", high=3.0))[0].tolist() == [3]
    assert importance_weights(huge, row, main, CorrectionConfig("mis", high=3.0))[0].tolist() == [0]


def random_case(seed, rows=6, off_policy=False, actuation=None):
    """Rows of 1 to 5 tokens, some auxiliary, with an engine that is off by about 0.5 nats."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (rows,), generator=g)
    row = torch.arange(rows).repeat_interleave(lengths)
    n = len(row)
    auxiliary = (torch.rand(rows, generator=g) < 0.3)[row]
    log_probs = -3 * torch.rand(n, generator=g)
    old = log_probs + 0.2 * torch.randn(n, generator=g) if off_policy else None
    behavior = (log_probs if old is None else old) + 0.5 * torch.randn(n, generator=g)
    token_rows = TokenRows(
        row=row,
        weights=torch.rand(n, generator=g),
        advantages=torch.randn(rows, generator=g)[row],
        auxiliary=auxiliary,
        correct=auxiliary | (torch.rand(rows, generator=g) < 0.5)[row],
        behavior_log_probs=behavior,
        actuation=actuation or Actuation("resample", 1.2, 1.0),
        old_log_probs=old,
    )
    return PolicyOutputs(log_probs.requires_grad_(), torch.rand(n, generator=g)), token_rows


def gradient(outputs, token_rows, objective):
    (grad,) = torch.autograd.grad(policy_loss(outputs, token_rows, objective)[0], outputs.log_probs)
    return grad


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["token", "sequence"]))
def test_limits_out_of_reach_leave_the_ratio(seed, off_policy, level):
    """Main tokens' gradient times exactly pi_learner / pi_engine at the behaviour weights.

    Auxiliary ones as without.
    """
    outputs, token_rows = random_case(seed, off_policy=off_policy)
    learner = outputs.log_probs.detach() if token_rows.old_log_probs is None else token_rows.old_log_probs
    log_ratio = learner - token_rows.behavior_log_probs
    if level == "sequence":
        log_ratio = torch.stack([log_ratio[token_rows.row == r].sum() for r in token_rows.row])
    ratio = torch.where(token_rows.auxiliary, 1.0, log_ratio.exp())
    plain = gradient(outputs, token_rows, OFF)
    for kind in ("tis", "mis"):
        torch.testing.assert_close(
            gradient(outputs, token_rows, corrected(kind=kind, level=level, high=1e30)), plain * ratio
        )


@given(st.integers(0, 10**6), st.sampled_from(["tis", "mis"]), st.sampled_from(["token", "sequence"]))
def test_no_mismatch_is_no_correction_bit_for_bit(seed, kind, level):
    outputs, token_rows = random_case(seed)
    token_rows = replace(token_rows, behavior_log_probs=outputs.log_probs.detach())
    objective = corrected(kind=kind, level=level, low=1.0 if kind == "mis" else 0.0, high=1.0)
    loss, sums = policy_loss(outputs, token_rows, objective)
    plain, plain_sums = policy_loss(outputs, token_rows, OFF)
    assert loss.item() == plain.item()
    assert {name: sums[name] for name in plain_sums} == plain_sums
    assert torch.equal(gradient(outputs, token_rows, objective), gradient(outputs, token_rows, OFF))


@given(st.integers(0, 10**6), st.sampled_from(["token", "sequence"]))
def test_masked_tokens_add_nothing_and_change_no_other(seed, level):
    """Denominators count them still: what is left has the gradient it had, times its own weight."""
    outputs, token_rows = random_case(seed)
    objective = corrected(kind="mis", level=level, low=0.8, high=1.25)
    weights, _ = importance_weights(
        torch.where(token_rows.auxiliary, 0.0, outputs.log_probs.detach() - token_rows.behavior_log_probs),
        token_rows.row,
        ~token_rows.auxiliary,
        objective.correction,
    )
    assert ((weights == 0) | ((weights >= 0.8) & (weights <= 1.25))).all()
    torch.testing.assert_close(
        gradient(outputs, token_rows, objective), gradient(outputs, token_rows, OFF) * weights, rtol=1e-6, atol=0
    )


@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from(["token", "sequence"]))
def test_rows_in_any_micro_batches_give_the_same(seed, cut, level):
    outputs, token_rows = random_case(seed)
    objective = corrected(kind="tis", level=level, high=1.5)
    loss, sums = policy_loss(outputs, token_rows, objective)
    parts = []
    for where in (token_rows.row < cut, token_rows.row >= cut):
        picked = [
            replace(thing, **{k: v[where] for k, v in vars(thing).items() if isinstance(v, torch.Tensor)})
            for thing in (outputs, token_rows)
        ]
        parts.append(policy_loss(*picked, objective))
    assert sum(part[0].item() for part in parts) == pytest.approx(loss.item(), abs=1e-5)
    merged = {k: (max if k.endswith("_max") else sum)([p[1][k].item() for p in parts]) for k in sums}
    assert reduce_metrics(merged) == pytest.approx(reduce_metrics(sums), abs=1e-5, nan_ok=True)


def test_reweight_is_corrected_and_the_regularisers_are_not():
    """One masked token: its surrogate and its tempered positive go; KL and entropy bonus stay as they were."""
    token = dict(
        row=torch.zeros(1, dtype=torch.int64),
        weights=torch.ones(1),
        advantages=torch.ones(1),
        auxiliary=torch.tensor([False]),
        correct=torch.tensor([True]),
        behavior_log_probs=torch.tensor([-9.0]),
        reference_log_probs=torch.tensor([-2.0]),
    )
    objective = replace(corrected(kind="mis", high=2.0), kl_coef=0.1)

    def loss(actuation, **fields):
        outputs = PolicyOutputs(torch.tensor([-1.0]), torch.tensor([0.7]), torch.tensor([-0.5]))
        return policy_loss(outputs, TokenRows(**token, **fields, actuation=actuation), objective)[0].item()

    kl = 0.1 * (math.exp(-1) + 1 - 1)
    assert loss(Actuation("reweight", 1.5, 1.0), positive_weights=torch.ones(1)) == pytest.approx(kl)
    assert loss(Actuation("entropy_bonus", 0.2)) == pytest.approx(kl - 0.2 * 0.7)


def test_metrics_are_named_only_where_the_correction_is_on():
    outputs, token_rows = random_case(3)
    off, on = (reduce_metrics(policy_loss(outputs, token_rows, o)[1]) for o in (OFF, corrected(kind="tis")))
    assert on.keys() - off.keys() == {"correction_weight", "correction_outside", "correction_ess"}
    assert 0 < on["correction_ess"] <= 1
    assert not any(name.startswith("mismatch_bin") or name.endswith("_sum") for name in on)
