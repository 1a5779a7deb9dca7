from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import OverlongConfig, RunConfig
from pipeline.objectives.loss import PolicyOutputs, TokenRows, policy_loss
from pipeline.objectives.shape import shape_tokens
from pipeline.step.batch import build_batch, positives_consumed
from pipeline.step.prepare import prepare
from pipeline.types import Actuation, ControlDecision, Prompt, Role, Sample, SampleGroup, WeightSpan

DECISION = ControlDecision(1.3, 1.3, 4, "tracking", "")


class Policy:
    """A learner that knows the log-probs of its one batch, entropy 1 and moment 0, and remembers what it was asked."""

    def __init__(self, log_probs):
        self._log_probs, self.calls = log_probs, []

    def log_probs(self, batch, *, reference=False):
        self.calls.append("reference" if reference else "log_probs")
        return self._log_probs

    def statistics(self, batch):
        self.calls.append("statistics")
        one = torch.ones_like(self._log_probs)
        return {"log_probs": self._log_probs, "entropy": one, "moment": 0 * one}


def sample(tokens, reward=0.0, role=Role.MAIN, temperature=1.0, finish_reason="stop"):
    tokens = np.array(tokens, np.int64)
    return Sample(
        tokens,
        -0.1 * tokens.astype(np.float32),
        temperature,
        1,
        role,
        finish_reason,
        (),
        reward=reward,
        correct=reward == 1,
    )


def group(prompt_tokens, samples, name="p", role=Role.MAIN):
    return SampleGroup(Prompt(name, tuple(prompt_tokens), "", None, "exact"), tuple(samples), role)


def config(actuator="resample", **changes):
    run = RunConfig()
    run.entropy.actuator = actuator
    for key, value in changes.items():
        section = next(s for s in (run.entropy, run.objective, run.rollout, run.learner) if hasattr(s, key))
        setattr(section, key, value)
    return run


MAIN = [
    group([1, 2], [sample([3, 4, 5], 1.0), sample([6], 0.0)], "a"),
    group([7], [sample([8, 9], 0.0), sample([10, 11], 0.0)], "b"),
]


def auxiliary(*samples):
    return [group([1, 2], [replace(s, role=Role.AUXILIARY, temperature=1.3) for s in samples], "a", Role.AUXILIARY)]


def test_layout_of_rows():
    batch = build_batch(MAIN, auxiliary(sample([12, 13], 1.0), sample([14], 0.0)), DECISION, config())
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 9, 7, 10, 11, 1, 2, 12, 13]
    assert batch.lengths.tolist() == [5, 3, 3, 3, 4]
    assert batch.targets.tolist() == [3, 1, 2, 2, 2]
    assert batch.loss_mask.int().tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1]
    assert batch.row_of_target.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    torch.testing.assert_close(batch.behavior_log_probs, -0.1 * batch.tokens[batch.loss_mask])
    assert batch.auxiliary.tolist() == [False] * 4 + [True]
    assert batch.correct.tolist() == [True, False, False, False, True]
    assert batch.temperatures.tolist() == pytest.approx([1.0] * 4 + [1.3])
    assert batch.advantages.tolist() == pytest.approx(
        [0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4), 0, 0, 0], rel=1e-5
    )
    assert batch.actuation == Actuation("resample", 1.3, 1.0)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token_mean", [1 / 8] * 4),
        ("sequence_mean", [1 / 12, 1 / 4, 1 / 8, 1 / 8]),
        ("dr_grpo", [1 / 64] * 4),
    ],
)
def test_main_weights(aggregation, weights):
    batch = build_batch(MAIN, [], DECISION, config(aggregation=aggregation, max_new_tokens=16))
    assert batch.weights.tolist() == pytest.approx(weights)


@pytest.mark.parametrize(("mean", "weights"), [("positives", [0.5 / 5] * 2), ("samples", [0.5 / 4 / 2, 0.5 / 4 / 3])])
def test_positive_weights_of_auxiliary_rows(mean, weights):
    drawn = auxiliary(sample([1, 2], 1.0), sample([1], 0.0), sample([1, 2, 3], 1.0), sample([4] * 9, 0.0))
    batch = build_batch(MAIN, drawn, DECISION, config(alpha=0.5, positive_mean=mean))
    assert batch.weights[batch.auxiliary].tolist() == pytest.approx(weights)
    assert positives_consumed(batch) == 2


@pytest.mark.parametrize(("mean", "weight"), [("positives", 2 / 3), ("samples", 2 / 4 / 3)])
def test_reweight_carries_positive_weights_on_correct_main_rows(mean, weight):
    batch = build_batch(MAIN, [], DECISION, config("reweight", alpha=2.0, positive_mean=mean))
    assert batch.positive_weights.tolist() == pytest.approx([weight, 0, 0, 0])
    assert positives_consumed(batch) == 1


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12)


@given(
    LENGTHS,
    LENGTHS,
    st.floats(0.01, 4.0),
    st.sampled_from(["token_mean", "sequence_mean", "dr_grpo"]),
    st.sampled_from(["positives", "samples"]),
)
def test_weights_sum_to_what_the_mean_says(main, extra, alpha, aggregation, mean):
    settings = config(alpha=alpha, aggregation=aggregation, positive_mean=mean, max_new_tokens=10)
    drawn = auxiliary(*[sample([1] * n, float(ok)) for n, ok in extra])
    batch = build_batch([group([1], [sample([2] * n, float(ok)) for n, ok in main])], drawn, DECISION, settings)
    mass = batch.weights * batch.targets
    lengths = np.array([n for n, _ in main])
    assert mass[~batch.auxiliary].sum().item() == pytest.approx(
        lengths.mean() / 10 if aggregation == "dr_grpo" else 1, rel=1e-5
    )
    correct = sum(ok for _, ok in extra)
    share = (correct > 0) if mean == "positives" else correct / len(extra)
    assert mass[batch.auxiliary].sum().item() == pytest.approx(alpha * share, rel=1e-5)


def test_routes_lie_over_the_tokens_that_are_read():
    """By hand: a row's last token is read by nobody, and has zeros."""
    first, second = (np.arange(1, 1 + 4 * n, dtype=np.uint8).reshape(n, 2, 2) for n in (3, 4))
    main = [group([1, 2], [replace(sample([3, 4], 1.0), routes=first), replace(sample([5, 6, 7]), routes=second)])]
    batch = build_batch(main, [], ControlDecision(1.0, 1.0, 0, "off", ""), config())
    nothing = np.zeros((1, 2, 2), np.uint8)
    assert np.array_equal(batch.routes.numpy(), np.concatenate([first, nothing, second, nothing]))
    assert (
        build_batch([group([1], [sample([3])])], [], ControlDecision(1.0, 1.0, 0, "off", ""), config()).routes is None
    )


@pytest.mark.parametrize(("routes", "said"), [(None, "no routes"), (np.zeros((2, 2, 2), np.uint8), "routes of 2")])
def test_a_sample_without_the_routes_that_others_have_is_refused(routes, said):
    whole = replace(sample([3, 4]), routes=np.zeros((3, 2, 2), np.uint8))
    main = [group([1, 2], [whole, replace(sample([5, 6]), routes=routes)], name="q7")]
    with pytest.raises(ValueError, match=f"'q7': a sample has {said} for the 3 tokens"):
        build_batch(main, [], ControlDecision(1.0, 1.0, 0, "off", ""), config())


def bits(tensor):
    return tensor.detach().view(torch.int32)


def train(batch):
    """Loss, gradient of the log-probs and sums under one fixed policy."""
    n = int(batch.targets.sum())
    g = torch.Generator().manual_seed(3)
    log_probs = (-2 * torch.rand(n, generator=g)).requires_grad_(True)
    entropy, tempered = torch.rand(n, generator=g).requires_grad_(True), -2 * torch.rand(n, generator=g)
    loss, sums = policy_loss(PolicyOutputs(log_probs, entropy, tempered), TokenRows.of(batch), config().objective)
    loss.backward()
    return loss, log_probs.grad, sums


@pytest.mark.parametrize(
    ("actuator", "changes", "command"),
    [
        ("resample", {"alpha": 0.0}, 1.4),
        ("reweight", {"alpha": 0.0}, 1.4),
        ("fc", {"alpha": 0.0}, 1.4),
        ("dcpo", {"alpha": 0.0}, 1.4),
        ("tok", {}, 0.0),
        ("entropy_bonus", {}, 0.0),
        ("clip_cov", {}, 0.0),
    ],
)
def test_alpha_zero_or_command_zero_is_grpo_bit_for_bit(actuator, changes, command):
    grpo = train(build_batch(MAIN, [], DECISION, config(controller="none")))
    drawn = auxiliary(sample([12, 13], 1.0)) if actuator == "resample" else []
    batch = build_batch(MAIN, drawn, replace(DECISION, command=command), config(actuator, **changes))
    batch = prepare(batch, Policy(torch.zeros_like(batch.behavior_log_probs)), config(actuator, **changes), 0)
    other = train(batch)
    assert torch.equal(bits(grpo[0]), bits(other[0]))
    assert torch.equal(bits(grpo[1]), bits(other[1]))
    assert grpo[2] == other[2]


@pytest.mark.parametrize("actuator", ["resample", "reweight"])
def test_positives_do_change_the_loss(actuator):
    grpo = train(build_batch(MAIN, [], DECISION, config(controller="none")))
    drawn = auxiliary(sample([12, 13], 1.0)) if actuator == "resample" else []
    other = train(build_batch(MAIN, drawn, DECISION, config(actuator)))
    assert other[0] != grpo[0]
    assert other[2]["positive_term"] > 0
    assert {k: v for k, v in other[2].items() if k != "positive_term"}.keys() == grpo[2].keys() - {"positive_term"}


@pytest.mark.parametrize("mean", ["positives", "samples"])
@pytest.mark.parametrize(
    "drawn", [[], auxiliary(sample([1, 2], 0.0)), auxiliary(sample([1], 1.0, finish_reason="abort"))]
)
def test_no_positive_means_no_positive_term(drawn, mean):
    grpo = build_batch(MAIN, [], DECISION, config(controller="none"))
    batch = build_batch(MAIN, drawn, DECISION, config(positive_mean=mean))
    assert positives_consumed(batch) == 0
    assert train(batch)[0] == train(grpo)[0]


def test_reweight_without_a_correct_row():
    wrong = [group([1], [sample([2], 0.0), sample([3], 0.5)])]
    batch = build_batch(wrong, [], DECISION, config("reweight"))
    assert batch.positive_weights is None
    assert positives_consumed(batch) == 0


def test_aborted_and_empty_samples_leave_no_trace():
    spoilt = [
        group(
            [1, 2],
            [
                sample([3, 4, 5], 1.0),
                sample([], 0.0),
                sample([6], 0.0),
                sample([9, 9, 9, 9], 0.0, finish_reason="abort"),
            ],
            "a",
        ),
        group([7], [sample([8, 9], 0.0), sample([10, 11], 0.0)], "b"),
        group([5], [sample([1], 1.0, finish_reason="abort")], "c"),
    ]
    drawn = auxiliary(sample([12, 13], 1.0), sample([14], 0.0))
    spoilt_drawn = auxiliary(
        sample([12, 13], 1.0), sample([], 1.0), sample([14], 0.0), sample([3], 1.0, finish_reason="abort")
    )
    for mean in ("positives", "samples"):
        clean = build_batch(MAIN, drawn, DECISION, config(positive_mean=mean))
        batch = build_batch(spoilt, spoilt_drawn, DECISION, config(positive_mean=mean))
        for name, value in vars(clean).items():
            assert (
                torch.equal(getattr(batch, name), value)
                if isinstance(value, torch.Tensor)
                else getattr(batch, name) == value
            )


@pytest.mark.parametrize(
    ("main", "message"),
    [
        ([], "nothing to train on"),
        ([group([1], [sample([2], finish_reason="abort")])], "nothing to train on"),
        ([group([], [sample([2])], "empty")], "prompt 'empty' has no tokens"),
        ([group([1], [sample([2], temperature=1.2)], "hot")], "prompt 'hot': a main sample was drawn at T=1.2"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(main, message):
    with pytest.raises(ValueError, match=message):
        build_batch(main, [], DECISION, config())


@given(st.floats(width=32))
def test_temperature_rule_main_rows_are_drawn_at_one(temperature):
    main = [group([1], [sample([2], 1.0, temperature=temperature)])]
    hot = [group([1], [sample([2], 1.0, Role.AUXILIARY, temperature)], role=Role.AUXILIARY)]
    if temperature == 1:
        build_batch(main, [], DECISION, config())
    else:
        with pytest.raises(ValueError, match="T="):
            build_batch(main, [], DECISION, config())
    if 0 < temperature < float("inf"):
        assert build_batch(MAIN, hot, DECISION, config()).temperatures[-1] == np.float32(temperature)
    else:
        with pytest.raises(ValueError, match="must be positive"):
            build_batch(MAIN, hot, DECISION, config())


@pytest.mark.parametrize(
    ("actuator", "expected"), [("fc", 1), ("dcpo", 1), ("tok", 1), ("entropy_bonus", 1), ("clip_cov", 1)]
)
def test_positives_consumed_by_the_other_actuators(actuator, expected):
    assert positives_consumed(build_batch(MAIN, [], DECISION, config(actuator))) == expected
    wrong = build_batch([MAIN[1]], [], DECISION, config(actuator))
    assert positives_consumed(wrong) == (0 if actuator in ("fc", "dcpo", "tok") else 1)


def test_what_a_batch_needs_of_the_policy_before_its_update():
    def asked(settings, command=0.1):
        batch = build_batch(MAIN, [], replace(DECISION, command=command), settings)
        policy = Policy(-torch.ones_like(batch.behavior_log_probs))
        prepared = prepare(batch, policy, settings, 0)
        assert (prepared.old_log_probs is not None) == (settings.learner.updates_per_step > 1)
        calls = list(policy.calls)
        kept = prepare(replace(batch, old_log_probs=torch.zeros_like(batch.behavior_log_probs)), policy, settings, 0)
        assert not kept.old_log_probs.any()
        return calls

    assert asked(config("reweight")) == []
    assert asked(config("reweight", kl_coef=0.1)) == ["reference"]
    assert asked(config("reweight", updates_per_step=2)) == ["log_probs"]
    assert asked(config("clip_cov")) == ["statistics"]
    assert asked(config("clip_cov"), command=0.0) == []
    assert asked(config("clip_cov", updates_per_step=2), command=0.0) == ["log_probs"]
    assert asked(config("clip_cov", controller="none")) == []
    assert asked(config(controller="none", token_shaping=["opefo"])) == ["statistics"]
    assert asked(config(controller="none", loss="htpo")) == ["statistics"]
    assert asked(config(controller="none", loss="gspo", updates_per_step=2)) == ["log_probs"]


def test_stale_rows_meet_the_policy_that_drew_them_or_that_the_update_starts_from():
    settings = config("resample")
    hot_sample = sample([3, 4], 1.0, Role.AUXILIARY, temperature=1.3)
    batch = build_batch(MAIN, [group([1, 2], [hot_sample], "a", Role.AUXILIARY)], DECISION, settings)
    policy = Policy(torch.full((2,), -7.0))  # of the one hot row
    assert prepare(batch, policy, settings, 0).old_log_probs is None
    old = prepare(replace(batch, staleness=1), policy, settings, 0).old_log_probs
    hot = (batch.temperatures != 1)[batch.row_of_target]
    assert int(hot.sum()) == 2
    assert old[~hot].equal(batch.behavior_log_probs[~hot])
    assert (old[hot] == -7.0).all(), "their own are not at T=1"
    assert policy.calls == ["log_probs"]
    settings.objective.old_log_probs = "learner"
    assert prepare(replace(batch, staleness=1), policy, settings, 0).old_log_probs is None


def test_clip_cov_detaches_the_top_covariance_of_the_whole_batch():
    # Main tokens: log-probs -1 -3 | -5 -7 with advantages 1 1 | -1 -1; means -4 and 0; covariances 3 1 | 1 3.
    main = [group([1], [sample([2, 3], 1.0), sample([4, 5], 0.0)])]
    batch = build_batch(main, [], replace(DECISION, command=0.5), config("clip_cov"))
    batch = replace(batch, advantages=torch.tensor([1.0, -1.0]))
    policy = Policy(torch.tensor([-1.0, -3.0, -5.0, -7.0]))
    assert prepare(batch, policy, config("clip_cov"), 0).token_weights.tolist() == [0, 1, 1, 0]
    batch = replace(batch, actuation=Actuation("clip_cov", 1e-6))
    assert (prepare(batch, policy, config("clip_cov"), 0).token_weights == 0).sum() == 1


def test_dcpo_share_follows_the_distance_to_the_target():
    # accuracy 1/4, gap 0.05: a = 0.2, share 0.2 / 1.2; a gap beyond 0.1 counts as 0.1: a = 0.4
    def alpha(target, measured, main=MAIN, **changes):
        decision = replace(DECISION, target=target, filtered_entropy=measured)
        return build_batch(main, [], decision, config("dcpo", **changes)).actuation.alpha

    assert alpha(0.3, 0.25) == pytest.approx(0.2 / 1.2)
    assert alpha(0.25, 0.3) == pytest.approx(0.2 / 1.2)
    assert alpha(0.9, 0.25) == pytest.approx(0.4 / 1.4)
    assert alpha(0.3, 0.25, alpha=2.0) == pytest.approx(0.4 / 1.4)
    assert alpha(0.3, float("nan")) == 0
    assert alpha(0.3, 0.25, [MAIN[1]]) == 0  # none correct


def test_overlong_rewards_fall_over_the_buffer():
    # limit 6, buffer 4: lengths 2, 4, 6 lose 0, 1/2, 1; dr_grpo centres what is left of 1, 1, 0
    main = [group([1], [sample([1] * 2, 1.0), sample([1] * 4, 1.0), sample([1] * 6, 0.0)])]
    settings = config(controller="none", advantage="dr_grpo", max_new_tokens=6, overlong=OverlongConfig(buffer=4))
    batch = build_batch(main, [], DECISION, settings)
    left = torch.tensor([1.0, 0.5, -1.0])
    torch.testing.assert_close(batch.advantages, left - left.mean())
    assert batch.correct.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [("token_mean", [1 / 3, 0, 1 / 3]), ("sequence_mean", [1 / 4, 0, 1 / 2]), ("dr_grpo", [1 / 12, 0, 1 / 12])],
)
def test_overlong_filter_leaves_truncated_rows_out_of_loss_and_denominators(aggregation, weights):
    cut = sample([1] * 6, 0.0, finish_reason="length")
    main = [group([1], [sample([1] * 2, 1.0), cut, sample([1], 0.0)])]
    settings = config(
        controller="none", aggregation=aggregation, max_new_tokens=6, overlong=OverlongConfig(filter=True)
    )
    batch = build_batch(main, [], DECISION, settings)
    assert batch.weights.tolist() == pytest.approx(weights)
    assert batch.targets.tolist() == [2, 6, 1]  # still measured
    alone = build_batch([group([1], [cut, cut])], [], DECISION, settings)
    assert alone.weights.tolist() == [0, 0]


@pytest.mark.parametrize(("mean", "weight"), [("positives", 1 / 3), ("samples", 1 / (2 * 3)), ("main", 1 / 5)])
def test_overlong_filter_leaves_truncated_rows_out_of_the_positive_term_too(mean, weight):
    """Correct, but cut off: of rows with 3, 2 and 4 tokens the last counts nowhere, and no actuator acts through it."""
    cut = sample([3, 4, 5, 6], 1.0, finish_reason="length")
    main = [group([1], [sample([3, 4, 5], 1.0), sample([6, 7], 0.0), cut])]
    settings = config("reweight", alpha=1.0, positive_mean=mean, overlong=OverlongConfig(filter=True))
    batch = build_batch(main, [], DECISION, settings)
    assert batch.positive_weights.tolist() == pytest.approx([weight, 0, 0])
    assert positives_consumed(batch) == 1
    assert build_batch([group([1], [cut, sample([6], 0.0)])], [], DECISION, settings).positive_weights is None


def test_auxiliary_rows_replace_as_many_main_rows():
    drawn = auxiliary(sample([1, 2], 1.0), sample([3], 1.0), sample([1], 0.0))
    settings = config(positive_mean="main", auxiliary_replaces=True, alpha=0.5)
    batch = build_batch(MAIN, drawn, DECISION, settings)
    assert batch.weights.tolist() == pytest.approx([0, 1 / 8, 0, 1 / 8, 0.5 / 8, 0.5 / 8])
    settings = config(positive_mean="main", auxiliary_replaces=True, aggregation="sequence_mean")
    batch = build_batch(MAIN, drawn, DECISION, settings)
    assert batch.weights.tolist() == pytest.approx([0, 1 / 4, 0, 1 / 8, 1 / 8, 1 / 4])


def test_tokens_of_old_weights_carry_no_policy_loss():
    """They count in every denominator, and what shapes tokens weighs the others."""

    def drawn(tokens, reward, *spans):
        return replace(sample(tokens, reward), weight_versions=spans)

    first = drawn([3, 4, 5], 1.0, WeightSpan(3, 0, 2), WeightSpan(4, 2, 3))
    main = [group([1, 2], [first, drawn([6], 0.0, WeightSpan(4, 0, 1))], "a")]
    batch, whole = (build_batch(main, [], DECISION, config(), oldest) for oldest in (4, None))
    assert batch.token_weights.tolist() == [0, 0, 1, 1]
    assert batch.weights.tolist() == whole.weights.tolist()
    entropy = torch.tensor([3.0, 2.0, 1.0, 4.0])
    found = {"log_probs": torch.full((4,), -1.0), "entropy": entropy, "moment": 0 * entropy}
    shaped, plain = (shape_tokens(b, found, config(token_shaping=["high_entropy"]), 0) for b in (batch, whole))
    assert plain.token_weights.unique().numel() == 2
    assert shaped.token_weights.tolist() == (batch.token_weights * plain.token_weights).tolist()
