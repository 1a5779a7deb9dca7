import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import ADVANTAGES as NAMES
from pipeline.config.schema import AvspoConfig, ObjectiveConfig, PassAtKConfig
from pipeline.objectives.advantage import group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=20).map(np.array)
PLAIN = [name for name in NAMES if name != "avspo"]  # its virtual samples give groups of equal rewards an advantage
FIRST, SECOND = np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])


def advantages(kind, *groups, **changes):
    return group_advantages(
        groups, [np.asarray(group) == 1 for group in groups], ObjectiveConfig(advantage=kind, **changes)
    )


def test_hand_computed():
    # mean 1/4; unbiased variance (3 * 1/16 + 9/16) / 3 = 1/4, so std 1/2
    np.testing.assert_allclose(advantages("dr_grpo", FIRST)[0], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(advantages("grpo", FIRST)[0], np.array([0.75, -0.25, -0.25, -0.25]) / 0.5001)
    # against the mean of the other three: 0, then 1/3
    np.testing.assert_allclose(advantages("rloo", FIRST)[0], [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


def test_reinforce_pp_is_normalised_over_the_step():
    # 3 of 8 correct: mean 3/8, unbiased variance (3 * 25 + 5 * 9) / 64 / 7 = 15/56
    std = (15 / 56) ** 0.5 + 1e-4
    first, second = advantages("reinforce_pp", FIRST, SECOND)
    np.testing.assert_allclose(first, np.array([5, -3, -3, -3]) / 8 / std, rtol=1e-6)
    np.testing.assert_allclose(second, np.array([5, 5, -3, -3]) / 8 / std, rtol=1e-6)
    # centred in each group: .75, -.25 x 3 and +-.5; mean 0, sum of squares 12/16 + 1
    std = (1.75 / 7) ** 0.5 + 1e-4
    first, second = advantages("reinforce_pp_baseline", FIRST, SECOND)
    np.testing.assert_allclose(first, np.array([0.75, -0.25, -0.25, -0.25]) / std, rtol=1e-6)
    np.testing.assert_allclose(second, np.array([0.5, 0.5, -0.5, -0.5]) / std, rtol=1e-6)


@given(REWARDS, st.integers(1, 5))
def test_pass_at_k_compares_subsets(rewards, k):
    """The mean of the standardised pass@k reward over all subsets that a sample belongs to, by enumeration."""
    rewards = rewards[:8]
    (found,) = advantages("pass_at_k", rewards, pass_at_k=PassAtKConfig(samples=k, share=1.0))
    subsets = list(combinations(range(len(rewards)), k))
    passed = np.array([any(rewards[i] == 1 for i in subset) for subset in subsets], float)
    if not subsets or passed.min() == passed.max():
        assert not found.any()
        return
    scaled = (passed - passed.mean()) / (passed.std() + 1e-4)
    expected = [scaled[[i in subset for subset in subsets]].mean() for i in range(len(rewards))]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pass_at_k_is_mixed_with_grpo():
    half = PassAtKConfig(samples=2, share=0.5)
    alone = advantages("pass_at_k", FIRST, pass_at_k=PassAtKConfig(samples=2, share=1.0))[0]
    mixed = advantages("pass_at_k", FIRST, pass_at_k=half)[0]
    np.testing.assert_allclose(mixed, (alone + advantages("grpo", FIRST)[0]) / 2, rtol=1e-6)


@given(REWARDS)
def test_grpo_equals_torch_unbiased_std(rewards):
    r = torch.tensor(rewards)
    expected = ((r - r.mean()) / (r.std() + 1e-4)).float()
    np.testing.assert_allclose(advantages("grpo", rewards)[0], expected, atol=1e-5)


@given(REWARDS, REWARDS, st.sampled_from(PLAIN))
def test_zero_mean_order_preserving(first, second, kind):
    found = advantages(kind, first, second)
    assert abs(np.concatenate(found).sum()) < 1e-4
    for rewards, own in zip((first, second), found, strict=True):
        assert own.dtype == np.float32
        order = np.argsort(rewards, kind="stable")
        assert (np.diff(own[order]) >= -1e-6).all()


@given(REWARDS, REWARDS, st.sampled_from([name for name in PLAIN if name not in ("pass_at_k", "mcpo")]))
def test_shift_invariant(first, second, kind):
    np.testing.assert_allclose(
        np.concatenate(advantages(kind, first + 3, second + 3)),
        np.concatenate(advantages(kind, first, second)),
        atol=1e-5,
    )


@given(st.permutations(range(3)), st.sampled_from(NAMES))
def test_order_of_groups_is_free(order, kind):
    groups = [FIRST, SECOND, np.array([0.5, 1.0])]
    found = advantages(kind, *groups)
    moved = advantages(kind, *(groups[i] for i in order))
    for i, own in zip(order, moved, strict=True):
        np.testing.assert_allclose(own, found[i], atol=1e-6)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [1.0], []])
def test_nothing_to_learn_is_exactly_zero(rewards, kind):
    assert advantages(kind, np.array(rewards))[0].tolist() == [0.0] * len(rewards)


def test_unknown_kind():
    with pytest.raises(ValueError, match="'median'"):
        advantages("median", np.array([0.0, 1.0]))


def test_pass_at_k_knows_a_correct_sample_whose_length_was_penalised():
    objective = ObjectiveConfig(advantage="pass_at_k", pass_at_k=PassAtKConfig(samples=2, share=1.0))
    marks = np.array([True, True, False, False])
    plain, penalised = (
        group_advantages([np.array(rewards)], [marks], objective)[0]
        for rewards in ([1.0, 1.0, 0.0, 0.0], [1.0, 0.4, 0.0, 0.0])
    )
    assert plain.tolist() == penalised.tolist()


@given(st.lists(st.booleans(), min_size=2, max_size=20))
def test_mcpo_weighs_prompts_beyond_one_half_by_their_variance(right):
    """With rewards of 0 and 1: (r - p) / (std 2 sqrt(p (1 - p))) beyond p = 0.5, GRPO's up to there, 0 at 1."""
    rewards = [float(mark) for mark in right]
    count, p = len(rewards), sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - p) ** 2 for r in rewards) / (count - 1)) + 1e-4
    scale = 1 if p <= 0.5 else 2 * math.sqrt(p * (1 - p))
    expected = [0.0] * count if p in (0, 1) else [(r - p) / (std * scale) for r in rewards]
    np.testing.assert_allclose(advantages("mcpo", np.array(rewards))[0], expected, rtol=1e-5)


def test_mcpo_leaves_a_mastered_prompt_to_its_loss():
    """Also where a penalised length makes the rewards differ."""
    objective = ObjectiveConfig(advantage="mcpo")
    assert group_advantages([np.array([1.0, 0.5])], [np.array([True, True])], objective)[0].tolist() == [0, 0]


def reference(rewards, virtual):
    """The advantages of ``rewards`` among themselves and ``virtual``, in plain Python."""
    both = [*rewards, *virtual]
    mean = sum(both) / len(both)
    std = math.sqrt(sum((r - mean) ** 2 for r in both) / (len(both) - 1))
    return [(r - mean) / (std + 1e-4) for r in rewards]


@pytest.mark.parametrize(
    ("rewards", "virtual"),
    [([1.0] * 4, [2 / 3, 1 / 3]), ([0.5] * 3, [1 / 3, 1 / 6]), ([0.0] * 4, [0.1, 0.05]), ([1.0], [2 / 3, 1 / 3])],
)
def test_avspo_compares_equal_rewards_with_virtual_ones(rewards, virtual):
    paper = AvspoConfig(virtual=2)
    other = np.array([1.0, 0.0, 0.0])
    found, plain = advantages("avspo", np.array(rewards), other, avspo=paper)
    np.testing.assert_allclose(found, reference(rewards, virtual), rtol=1e-5)
    np.testing.assert_allclose(plain, advantages("grpo", other)[0])
    assert (found > 0).all() == (rewards[0] > 0)
    # the public code adds nothing here: not all of the step's rewards are equal
    assert advantages("avspo", np.array(rewards), other, avspo=AvspoConfig(variant="code"))[0].tolist() == [0] * len(
        rewards
    )


@pytest.mark.parametrize(("reward", "touched"), [(0.0, True), (1.0, True), (0.5, False)])
def test_avspos_code_adds_the_opposite_reward_to_a_step_that_is_all_right_or_all_wrong(reward, touched):
    groups = [np.full(3, reward), np.full(5, reward)]
    for group, found in zip(groups, advantages("avspo", *groups, avspo=AvspoConfig(variant="code")), strict=True):
        expected = reference(group.tolist(), [1 - reward]) if touched else [0.0] * len(group)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_avspo_takes_a_group_without_samples(variant):
    assert advantages("avspo", np.array([]), avspo=AvspoConfig(variant=variant))[0].tolist() == []
