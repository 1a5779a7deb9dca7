"""Every surrogate against numbers worked out by hand: loss and slope of single tokens, and that nothing depends on the
cut.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import LOSSES as NAMES
from pipeline.config.schema import CeGppoConfig, KlCovConfig, McpoConfig, ObjectiveConfig
from pipeline.objectives.loss import PolicyOutputs, TokenRows, policy_loss
from pipeline.objectives.losses._inputs import Inputs
from pipeline.registry import load
from pipeline.types import Actuation

RANGE = ObjectiveConfig(clip_low=0.2, clip_high=0.28)
OLD = -2.0  # log-probability before the update


def values(objective, ratios, advantages, rows=None, marks=None):
    """Losses, slopes d loss / d log pi, and which tokens were bounded."""
    log_probs = torch.tensor([OLD + math.log(r) for r in ratios], requires_grad=True)
    old = torch.full_like(log_probs, OLD)
    row = torch.arange(len(ratios)) if rows is None else torch.tensor(rows)
    marks = None if marks is None else torch.tensor(marks, dtype=torch.uint8)
    inputs = Inputs(log_probs, old.detach(), torch.exp(log_probs - old), torch.tensor(advantages), row, marks)
    losses, bounded = load("pipeline.objectives.losses", objective.loss).surrogate(inputs, objective)
    losses.sum().backward()
    return losses.tolist(), log_probs.grad.tolist(), bounded.tolist()


def approx(numbers):
    return pytest.approx(numbers, rel=1e-5, abs=1e-6)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="'trpo'"):
        values(replace(RANGE, loss="trpo"), [1.0], [1.0])


@pytest.mark.parametrize("loss", NAMES)
def test_on_policy_every_gradient_is_the_policy_gradient(loss):
    _, slopes, _ = values(replace(RANGE, loss=loss), [1.0, 1.0, 1.0], [2.0, -0.5, 0.0])
    assert slopes == approx([-2.0, 0.5, 0.0])


def test_gspo_gives_a_sequence_one_ratio():
    # Row 0: ratios 2 and 1/2, mean log-ratio 0, s = 1: not clipped, though each token is far out. Row 1: 1.5 and 1.5, s
    # = 1.5: clipped. Row 2, A < 0: 0.5 and 0.9, s = sqrt(.45) = .67: clipped.
    ratios, rows = [2.0, 0.5, 1.5, 1.5, 0.5, 0.9], [0, 0, 1, 1, 2, 2]
    losses, slopes, bounded = values(replace(RANGE, loss="gspo"), ratios, [1.0, 1.0, 2.0, 2.0, -1.0, -1.0], rows)
    assert losses == approx([-1, -1, -2.56, -2.56, 0.8, 0.8])
    assert slopes == approx([-1, -1, 0, 0, 0, 0])
    assert bounded == [False, False, True, True, True, True]
    _, slopes, _ = values(replace(RANGE, loss="gspo"), [1.1, 1.2], [2.0, 2.0], [0, 0])
    assert slopes == approx([-2 * math.sqrt(1.32)] * 2)


def test_cispo_truncates_the_weight_and_keeps_the_gradient():
    objective = replace(RANGE, loss="cispo", clip_low=1.0)
    losses, slopes, bounded = values(objective, [1.5, 1.1, 0.1, 1.5], [2.0, 1.0, 1.0, -1.0])
    assert slopes == approx([-2.56, -1.1, -0.1, 1.28])
    assert losses[0] == approx(-2.56 * (OLD + math.log(1.5)))
    assert bounded == [True, False, False, True]
    assert values(replace(objective, clip_low=0.2), [0.1], [1.0])[1] == approx([-0.8])


@pytest.mark.parametrize(
    ("loss", "advantage", "dual_clip"),
    [(name, 9.0, 0.0) for name in ("ppo", "gspo", "cispo", "ce_gppo", "htpo", "mcpo")]
    + [(name, -9.0, 10.0) for name in ("ppo", "htpo", "mcpo")]
    + [(name, -9.0, 0.0) for name in ("cispo", "ce_gppo")],
)
@pytest.mark.parametrize("log_ratio", [87.0, 89.0, 500.0])
def test_a_huge_ratio_where_a_loss_is_bounded_gives_a_finite_gradient(loss, advantage, dual_clip, log_ratio):
    """A > 0 above the range, or A < 0 where the loss or dual clip bounds it: the gradient must be bounded too."""
    log_probs = torch.tensor([0.0], requires_grad=True)
    old = torch.tensor([-log_ratio])
    rows = TokenRows(
        row=torch.tensor([0]),
        weights=torch.tensor([1.0]),
        advantages=torch.tensor([advantage]),
        auxiliary=torch.tensor([False]),
        correct=torch.tensor([True]),
        behavior_log_probs=old,
        actuation=Actuation(),
        old_log_probs=old,
    )
    objective = replace(RANGE, loss=loss, dual_clip=dual_clip)
    total, _ = policy_loss(PolicyOutputs(log_probs, torch.tensor([0.3])), rows, objective)
    total.backward()
    assert torch.isfinite(total)
    assert log_probs.grad.abs().item() <= 9 * 10


def test_ce_gppo_keeps_a_bounded_gradient_of_clipped_tokens():
    objective = replace(RANGE, loss="ce_gppo", ce_gppo=CeGppoConfig(beta_low=0.5, beta_high=0.75))
    losses, slopes, bounded = values(objective, [1.5, 0.5, 1.5, 0.5, 1.1], [2.0, -1.0, -1.0, 2.0, 1.0])
    # clipped: 2 x .75 x 1.28 and 1 x .5 x .8; the others -A r
    assert losses == approx([-1.92, 0.4, 1.5, -1.0, -1.1])
    assert slopes == approx([-1.92, 0.4, 1.5, -1.0, -1.1])
    assert bounded == [True, True, False, False, False]


def test_ce_gppo_bounds_a_negative_advantage_beyond_a_ratio_of_3():
    objective = replace(RANGE, loss="ce_gppo")
    losses, slopes, _ = values(objective, [2.9, 3.1, 40.0], [-2.0, -2.0, -2.0])
    assert losses == approx([5.8, 6.0, 6.0])
    assert slopes == approx([5.8, 0.0, 0.0])


def test_kl_cov_penalises_marked_tokens_and_clips_none():
    objective = replace(RANGE, loss="kl_cov", kl_cov=KlCovConfig(coef=0.5))
    losses, slopes, bounded = values(objective, [3.0, 3.0, 0.25], [1.0, 1.0, 1.0], marks=[0, 1, 1])
    assert losses == approx([-3.0, -3.0 + 0.5 * math.log(3), -0.25 + 0.5 * math.log(4)])
    assert slopes == approx([-3.0, -2.5, -0.75])  # the penalty pulls back to the old probability, from either side
    assert bounded == [False, True, True]


@given(st.floats(0.2, 3.0), st.floats(-2, 2), st.booleans())
def test_mcpo_holds_mastered_tokens_beyond_a_hinge(ratio, advantage, mastered):
    objective = replace(RANGE, loss="mcpo", mcpo=McpoConfig(delta=0.05, beta=2.0))
    (loss,), (slope,), (bounded,) = values(objective, [ratio], [advantage], marks=[int(mastered)])
    (plain,), (without,), (clipped,) = values(replace(RANGE, loss="ppo"), [ratio], [advantage])
    k3 = ratio - 1 - math.log(ratio)
    held = mastered and k3 > 0.05
    assert loss == pytest.approx(plain + (2 * (k3 - 0.05) if held else 0), rel=1e-4, abs=1e-5)
    assert slope == pytest.approx(without + (2 * (ratio - 1) if held else 0), rel=1e-4, abs=1e-5)
    assert bounded == clipped


def test_htpo_bounds_high_entropy_tokens_by_their_group():
    objective = replace(RANGE, loss="htpo")
    ratios = [1.5, 0.5, 1.1, 0.5, 1.5, 1.5, 0.5]
    advantages = [2.0, 2.0, 2.0, -1.0, -1.0, 2.0, -1.0]
    losses, slopes, bounded = values(objective, ratios, advantages, marks=[1, 1, 1, 2, 2, 0, 0])
    # hard and correct: pulled down beyond 1.28, by 1 / r below .8; wrong: pulled up below .8; unmarked: PPO
    assert losses == approx([2.56, 4.0, -2.2, -0.8, 1.5, -2.56, 0.8])
    assert slopes == approx([2.56, 4.0, -2.2, -0.8, 1.5, 0.0, 0.0])
    assert bounded == [True, True, False, True, False, True, True]
    capped = values(replace(objective, dual_clip=3.0), [8.0, 8.0], [-1.0, -1.0], marks=[2, 0])
    assert capped[0] == approx([3.0, 3.0])


@given(st.sampled_from(NAMES), st.integers(0, 1000), st.integers(1, 6), st.integers(0, 5))
def test_rows_may_be_cut_anywhere(loss, seed, rows, cut):
    """Loss and slope of a token depend on its own row only, so micro-batches and ranks change nothing."""
    g = torch.Generator().manual_seed(seed)
    row = torch.arange(rows).repeat_interleave(torch.randint(1, 5, (rows,), generator=g))
    n = len(row)
    old = -3 * torch.rand(n, generator=g)
    log_probs = old + 0.4 * torch.randn(n, generator=g)
    advantages = torch.randn(rows, generator=g)[row]
    marks = torch.randint(0, 3, (n,), generator=g, dtype=torch.uint8)
    objective = replace(RANGE, loss=loss)

    def run(which):
        own = log_probs[which].clone().requires_grad_(True)
        ratio = torch.exp(own - old[which])
        losses, bounded = load("pipeline.objectives.losses", objective.loss).surrogate(
            Inputs(own, old[which], ratio, advantages[which], row[which], marks[which]), objective
        )
        losses.sum().backward()
        return torch.stack([losses.detach(), own.grad, bounded.float()])

    whole = run(torch.arange(n))
    order = torch.randperm(rows, generator=g)
    part = torch.cat([(row == r).nonzero()[:, 0] for r in order[: min(cut, rows)]] or [torch.arange(0)])
    torch.testing.assert_close(run(part), whole[:, part], rtol=1e-5, atol=1e-6)
