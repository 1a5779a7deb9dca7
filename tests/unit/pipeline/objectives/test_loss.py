import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.loss import (
    PolicyOutputs,
    TokenRows,
    entropy_needs_grad,
    policy_loss,
    reduce_metrics,
    tempered_at,
)
from pipeline.types import Actuation
from tests.grids import ragged

PPO = ObjectiveConfig(clip_low=0.2, clip_high=0.28)


def rows(n=1, **fields):
    """``n`` main tokens of weight 1; keyword arguments are lists."""
    types = {"auxiliary": torch.bool, "correct": torch.bool, "row": torch.int64}
    given_ = {k: torch.tensor(v, dtype=types.get(k, torch.float32)) for k, v in fields.items() if k != "actuation"}
    base = dict(
        row=torch.arange(n),
        weights=torch.ones(n),
        advantages=torch.zeros(n),
        auxiliary=torch.zeros(n, dtype=torch.bool),
        correct=torch.zeros(n, dtype=torch.bool),
        behavior_log_probs=torch.zeros(n),
        actuation=fields.get("actuation", Actuation()),
    )
    return TokenRows(**(base | given_))


def outputs(log_probs, entropy=None, tempered=None):
    entropy = torch.ones(len(log_probs)) if entropy is None else torch.tensor(entropy)
    return PolicyOutputs(
        torch.tensor(log_probs, requires_grad=True),
        entropy.requires_grad_(True),
        None if tempered is None else torch.tensor(tempered),
    )


def loss_and_grad(out, token_rows, objective=PPO):
    loss, sums = policy_loss(out, token_rows, objective)
    loss.backward()
    return loss.item(), out.log_probs.grad.tolist(), sums


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.56, 0.0),  # clipped high: 1.28 x 2, no gradient
        (0.5, 2.0, -1.0, -1.0),  # a good token gone rare is not clipped
        (0.5, -1.0, 0.8, 0.0),  # clipped low
        (1.5, -1.0, 1.5, 1.5),  # a bad token gone frequent is not clipped
    ],
)
def test_clipped_surrogate(ratio, advantage, term, slope):
    loss, grad, sums = loss_and_grad(outputs([math.log(ratio)]), rows(advantages=[advantage], old_log_probs=[0.0]))
    assert loss == pytest.approx(term, rel=1e-6)
    assert grad == [pytest.approx(slope, rel=1e-6)]
    assert sums["clip_sum"].item() == (slope == 0)


def test_dual_clip_bounds_negative_advantages_only():
    objective = replace(PPO, dual_clip=3.0)
    token_rows = rows(2, advantages=[-1.0, 1.0], old_log_probs=[0.0, 0.0])
    loss, grad, _ = loss_and_grad(outputs([math.log(8.0), math.log(0.1)]), token_rows, objective)
    assert loss == pytest.approx(3.0 - 0.1, rel=1e-6)
    assert grad == [0.0, pytest.approx(-0.1, rel=1e-6)]


def test_on_policy_ratio_is_exactly_one():
    _, grad, sums = loss_and_grad(outputs([-0.3, -7.1, -1e-9]), rows(3, advantages=[1.0, -0.5, 0.25]))
    assert grad == [-1.0, 0.5, -0.25]
    assert sums["ratio_sum"].item() == 3.0


def test_kl_is_k3_on_main_rows_only():
    token_rows = rows(2, reference_log_probs=[-1.0, -1.0], auxiliary=[False, True], weights=[0.5, 0.0])
    loss, grad, sums = loss_and_grad(outputs([-2.0, -5.0]), token_rows, replace(PPO, kl_coef=0.1))
    assert loss == pytest.approx(0.1 * 0.5 * (math.e - 2), rel=1e-6)
    assert grad[0] == pytest.approx(0.1 * 0.5 * (1 - math.e), rel=1e-6)
    assert grad[1] == 0
    assert reduce_metrics(sums)["kl"] == pytest.approx(math.e - 2, rel=1e-6)


def test_kl_of_auxiliary_rows_cannot_overflow():
    """An auxiliary or dummy row may have no reference (0) and a log-prob whose exponential overflows float32."""
    token_rows = rows(2, reference_log_probs=[-1.0, 0.0], auxiliary=[False, True], weights=[0.5, 0.0])
    loss, grad, sums = loss_and_grad(outputs([-1.0, -100.0]), token_rows, replace(PPO, kl_coef=0.1))
    assert (loss, grad, sums["kl_sum"].item()) == (0.0, [0.0, 0.0], 0.0)


def test_positive_term_of_auxiliary_rows():
    # min(r, clip(r, .8, 1.28)) with advantage 1, whatever the advantages say; never an importance weight.
    logs = [math.log(r) for r in (0.5, 1.0, 1.5)]
    token_rows = rows(
        3,
        auxiliary=[True] * 3,
        correct=[True] * 3,
        weights=[0.1] * 3,
        advantages=[-9.0] * 3,
        old_log_probs=[0.0] * 3,
        behavior_log_probs=[-3.0] * 3,
    )
    loss, grad, sums = loss_and_grad(outputs(logs), token_rows)
    assert loss == pytest.approx(-0.1 * (0.5 + 1.0 + 1.28), rel=1e-6)
    assert grad == [pytest.approx(-0.05, rel=1e-6), pytest.approx(-0.1, rel=1e-6), 0.0]
    assert sums["positive_term"].item() == pytest.approx(-loss, rel=1e-6)


def test_auxiliary_rows_enter_no_other_metric():
    both = rows(
        2,
        auxiliary=[False, True],
        correct=[True, True],
        advantages=[1.0, 5.0],
        behavior_log_probs=[-0.5, -9.0],
        weights=[0.3, 0.7],
        old_log_probs=[-0.4, -3.0],
        reference_log_probs=[-1.0, -8.0],
    )
    alone = rows(
        1,
        correct=[True],
        advantages=[1.0],
        behavior_log_probs=[-0.5],
        weights=[0.3],
        old_log_probs=[-0.4],
        reference_log_probs=[-1.0],
    )
    _, with_auxiliary = policy_loss(outputs([-0.4, -2.0], [1.3, 9.0]), both, PPO)
    _, without = policy_loss(outputs([-0.4], [1.3]), alone, PPO)
    assert with_auxiliary.pop("positive_term") != without.pop("positive_term")
    assert with_auxiliary == without
    assert reduce_metrics(without | {"positive_term": 0.0}) == pytest.approx(
        {
            "entropy": 1.3,
            "entropy_sequence_mean": 1.3,
            "kl": math.exp(-0.6) - 0.4,
            "ratio": 1.0,
            "clip_fraction": 0.0,
            "mismatch_mean": 0.1,
            "mismatch_max": 0.1,
            "mismatch_p99": 0.1,
            "mismatch_kl": math.expm1(0.1) - 0.1,
            "mismatch_kl_k1": -0.1,
            "covariance": 0.0,
            "policy_loss": -0.3,
            "positive_term": 0.0,
        },
        rel=1e-5,
    )


def test_a_long_answer_weighs_more_in_the_token_mean_of_the_entropy_only():
    three = rows(4, row=[0, 1, 1, 2], auxiliary=[False, False, False, True])
    _, sums = policy_loss(outputs([-1.0] * 4, [1.0, 0.2, 0.4, 9.0]), three, PPO)
    means = reduce_metrics(sums)
    assert means["entropy"] == pytest.approx((1.0 + 0.2 + 0.4) / 3, rel=1e-6)
    assert means["entropy_sequence_mean"] == pytest.approx((1.0 + 0.3) / 2, rel=1e-6)


def test_stale_rows_weigh_the_entropy_by_the_ratio_at_most_two():
    both = rows(
        3, auxiliary=[False, False, True], behavior_log_probs=[-1.0, -3.0, -1.0], old_log_probs=[-1.0, -3.0, -1.0]
    )
    out = outputs([-1.0 + math.log(0.5), -1.0, -1.0], [0.8, 0.2, 5.0])
    _, fresh = policy_loss(out, both, PPO)
    assert "sensor_sum" not in fresh
    _, sums = policy_loss(out, replace(both, stale=True), PPO)
    assert sums["sensor_count"].item() == pytest.approx(0.5 + 2.0)  # exp(2) is truncated
    assert sums["sensor_sum"].item() == pytest.approx(0.5 * 0.8 + 2.0 * 0.2)
    # Of stale rows whose old log-probs are the engine's nobody knows how far engine and learner were apart.
    both_told = reduce_metrics(fresh)
    assert reduce_metrics(sums) == {name: of for name, of in both_told.items() if not name.startswith("mismatch")}
    _, of_learner = policy_loss(out, replace(both, stale=True), replace(PPO, old_log_probs="learner"))
    assert reduce_metrics(of_learner) == both_told


def test_reweight_adds_tempered_positives():
    # On policy the gradient is -(w A + w_pos pi_T/pi), the ratio pi_T/pi detached.
    act = Actuation("reweight", 1.5, 1.0)
    token_rows = rows(
        2,
        advantages=[0.5, -0.5],
        correct=[True, False],
        weights=[0.25, 0.25],
        positive_weights=[0.5, 0.0],
        actuation=act,
    )
    _, grad, sums = loss_and_grad(outputs([-1.0, -2.0], tempered=[-1.0 + math.log(3), 0.0]), token_rows)
    assert grad == pytest.approx([-(0.125 + 0.5 * 3), 0.125], rel=1e-6)
    assert sums["positive_term"].item() == pytest.approx(1.5, rel=1e-6)
    assert sums["policy_loss"].item() == 0


@pytest.mark.parametrize(("command", "kept"), [(0.5, (0.5, 1.5)), (-1.0, (2.0, 0.0)), (1.0, (0.0, 2.0))])
def test_high_prob_weakens_likely_positives_and_strengthens_likely_negatives(command, kept):
    # loss += -u mean(-r |A|) on tokens above 0.95: the gradient of a likely token is -(A - u |A|).
    act = Actuation("high_prob", command)
    token_rows = rows(4, advantages=[2.0, -2.0, 2.0, -2.0], actuation=act)
    likely, unlikely = math.log(0.96), math.log(0.94)
    _, grad, _ = loss_and_grad(outputs([likely, likely, unlikely, unlikely]), token_rows)
    assert grad == pytest.approx([-2 * kept[0], 2 * kept[1], -2.0, 2.0], rel=1e-6)


@pytest.mark.parametrize("command", [0.05, -0.05, 0.5, -0.5])
def test_surprisal_scales_advantages_and_keeps_their_sign(command):
    act, log_probs = Actuation("surprisal", command), [-0.1, -4.0, -0.1, -4.0]
    token_rows = rows(4, advantages=[2.0, 2.0, -2.0, -2.0], actuation=act)
    _, grad, _ = loss_and_grad(outputs(log_probs), token_rows)
    up = [2 * max(0, 1 - command * log_prob) for log_prob in log_probs[:2]]
    down = [-2 * max(0, 1 + command * log_prob) for log_prob in log_probs[2:]]
    assert grad == pytest.approx([-a for a in up + down], rel=1e-6)


@pytest.mark.parametrize("loss", ["ppo", "cispo", "ce_gppo"])
def test_clip_high_lets_ratios_grow_further(loss):
    """Ratios of 1.4 and 2 with A = 2, of 2 with A = -2; 1.28 + 0.5 = 1.78 is the bound.

    Beyond it PPO has no gradient, CISPO one of the bound's size, and so has CE-GPPO where beta_high is 1.
    """
    ratios, slopes = [1.4, 2.0, 2.0], {"ppo": [-2.8, 0.0, 4.0], "cispo": [-2.8, -3.56, 3.56]}
    old = torch.tensor([-2.0 - math.log(ratio) for ratio in ratios])
    objective = replace(PPO, loss=loss)
    for command, expected in ((0.5, slopes.get(loss, [-2.8, -3.56, 4.0])), (0.0, None)):
        token_rows = rows(3, advantages=[2.0, 2.0, -2.0], actuation=Actuation("clip_high", command))
        _, grad, sums = loss_and_grad(outputs([-2.0] * 3), replace(token_rows, old_log_probs=old), objective)
        if expected is None:
            plain = replace(token_rows, old_log_probs=old, actuation=Actuation())
            expected = loss_and_grad(outputs([-2.0] * 3), plain, objective)[1]
        assert grad == pytest.approx(expected, rel=1e-5)
        assert sums["clip_sum"].item() == {"ppo": 1, "cispo": 2, "ce_gppo": 1}[loss] + (command == 0)


def test_fc_adds_the_centred_ratio_to_the_advantage():
    act = Actuation("fc", 2.0, 0.5)
    token_rows = rows(3, advantages=[1.0, 1.0, -1.0], correct=[True, True, False], actuation=act)
    out = outputs([-1.0, -5.0, -1.0], tempered=[-1.0 - math.log(2), -1.0, -0.5])
    _, grad, _ = loss_and_grad(out, token_rows)
    assert grad == pytest.approx([-(1 + 0.5 * (0.5 - 1)), -(1 + 0.5 * (8 - 1)), 1.0], rel=1e-6)  # e^4 is cut at 8


def test_tok_adds_centred_surprise_to_the_advantage():
    act = Actuation("tok", 0.5)
    token_rows = rows(4, advantages=[1.0] * 4, correct=[True, True, True, False], actuation=act)
    out = outputs([-2.0, -0.1, -9.0, -2.0], entropy=[0.5, 0.5, 0.5, 0.5])
    _, grad, _ = loss_and_grad(out, token_rows)
    assert grad == pytest.approx([-(1 + 0.5 * 1.5), -(1 + 0.5 * -0.4), -(1 + 0.5 * 3.0), -1.0], rel=1e-6)
    assert out.entropy.grad is None


def test_entropy_bonus_differentiates_the_entropy_of_main_rows():
    act = Actuation("entropy_bonus", 0.2)
    out = outputs([-1.0, -1.0], entropy=[0.7, 0.9])
    loss, _, _ = loss_and_grad(out, rows(2, weights=[0.5, 0.5], auxiliary=[False, True], actuation=act))
    assert loss == pytest.approx(-0.2 * 0.5 * 0.7 - 0.5, rel=1e-6)
    assert out.entropy.grad.tolist() == pytest.approx([-0.1, 0.0])


def test_token_weights_detach_tokens():
    token_rows = rows(2, advantages=[1.0, 1.0], token_weights=[0.0, 1.0])
    assert loss_and_grad(outputs([-1.0, -1.0]), token_rows)[1] == [0.0, -1.0]


def test_what_each_actuator_needs_of_the_model():
    assert tempered_at(Actuation("reweight", 1.4, 1.0)) == 1.4
    assert tempered_at(Actuation("fc", 1.4, 1.0)) == 1.4
    assert tempered_at(Actuation("fc", 1.4, 0.0)) is None
    assert tempered_at(Actuation("resample", 1.4, 1.0)) is None  # its temperature lives in the samples
    assert entropy_needs_grad(Actuation("entropy_bonus", 0.1))
    assert not entropy_needs_grad(Actuation("entropy_bonus", 0.0))
    assert not entropy_needs_grad(Actuation("tok", 0.1))
    with pytest.raises(ValueError, match="tempered_at"):
        policy_loss(outputs([-1.0]), rows(correct=[True], actuation=Actuation("fc", 1.4, 1.0)), PPO)


def random_rows(n, seed, **changes):
    g = torch.Generator().manual_seed(seed)
    out = PolicyOutputs(-3 * torch.rand(n, generator=g), torch.rand(n, generator=g))
    auxiliary = torch.rand(n, generator=g) < 0.3
    fields = dict(
        row=torch.arange(n),
        weights=torch.rand(n, generator=g),
        advantages=torch.randn(n, generator=g),
        auxiliary=auxiliary,
        correct=auxiliary | (torch.rand(n, generator=g) < 0.5),
        behavior_log_probs=-3 * torch.rand(n, generator=g),
        actuation=Actuation("resample", 1.2, 1.0),
        old_log_probs=out.log_probs + 0.2 * torch.randn(n, generator=g),
    )
    return out, TokenRows(**(fields | changes))


def pick(thing, index):
    return replace(thing, **{k: v[index] for k, v in vars(thing).items() if isinstance(v, torch.Tensor)})


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(0, 40))
def test_loss_and_sums_add_up_over_any_split(seed, n, cut):
    out, token_rows = random_rows(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss, sums = policy_loss(out, token_rows, PPO)
    parts = [policy_loss(pick(out, i), pick(token_rows, i), PPO) for i in (order[:cut], order[cut:])]
    assert sum(p[0].item() for p in parts) == pytest.approx(loss.item(), abs=1e-5)
    for key, value in sums.items():
        merged = (max if key.endswith("_max") else sum)([p[1][key].item() for p in parts])
        assert merged == pytest.approx(value.item(), abs=1e-5), key


@given(st.integers(0, 1000), st.floats(0.05, 5.0))
def test_temperature_rule_loss_never_sees_how_a_sample_was_drawn(seed, temperature):
    """A sample's own log-probs, at its own temperature, move neither the loss nor any metric but the main rows'
    mismatch.
    """
    out, token_rows = random_rows(20, seed)
    drawn = torch.where(
        token_rows.auxiliary, token_rows.behavior_log_probs * temperature - 1, token_rows.behavior_log_probs
    )
    loss, sums = policy_loss(out, token_rows, PPO)
    other = replace(token_rows, behavior_log_probs=drawn, actuation=Actuation("resample", temperature, 1.0))
    assert policy_loss(out, other, PPO) == (loss, sums)


def test_no_tokens():
    loss, sums = policy_loss(outputs([]), rows(0), PPO)
    loss.backward()
    assert loss.item() == 0
    assert math.isnan(reduce_metrics(sums)["entropy"])


def test_rows_of_a_batch_follow_the_mask_row_by_row():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    grid = torch.arange(6.0).reshape(2, 3)
    batch = ragged(
        tokens=torch.zeros(2, 4, dtype=torch.long),
        lengths=torch.tensor([4, 2]),
        loss_mask=mask,
        weights=torch.tensor([0.1, 0.2]),
        advantages=torch.tensor([1.0, -1.0]),
        auxiliary=torch.tensor([False, True]),
        correct=torch.tensor([False, True]),
        temperatures=torch.tensor([1.0, 1.3]),
        behavior_log_probs=grid,
        old_log_probs=grid + 10,
        token_weights=grid + 20,
        positive_weights=torch.tensor([0.5, 0.0]),
    )
    flat = TokenRows.of(batch)
    assert flat.row.tolist() == [0, 0, 1]
    assert flat.weights.tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert flat.advantages.tolist() == [1, 1, -1]
    assert flat.auxiliary.tolist() == [False, False, True]
    assert flat.behavior_log_probs.tolist() == [1, 2, 3]
    assert flat.old_log_probs.tolist() == [11, 12, 13]
    assert flat.token_weights.tolist() == [21, 22, 23]
    assert flat.positive_weights.tolist() == [0.5, 0.5, 0]
    assert flat.reference_log_probs is None
