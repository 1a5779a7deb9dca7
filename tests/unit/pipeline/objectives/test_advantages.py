import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objectives.advantages import group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=20).map(np.array)


def test_hand_computed():
    # mean 1/4; unbiased variance (3 * 1/16 + 9/16) / 3 = 1/4, so std 1/2
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(group_advantages(rewards, "dr_grpo"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), np.array([0.75, -0.25, -0.25, -0.25]) / 0.5001)


@given(REWARDS)
def test_grpo_equals_torch_unbiased_std(rewards):
    r = torch.tensor(rewards)
    np.testing.assert_allclose(
        group_advantages(rewards, "grpo"), ((r - r.mean()) / (r.std() + 1e-4)).float(), atol=1e-5
    )


@given(REWARDS, st.sampled_from(["grpo", "dr_grpo"]))
def test_zero_mean_order_preserving_shift_invariant(rewards, kind):
    advantages = group_advantages(rewards, kind)
    assert abs(advantages.sum()) < 1e-4
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(advantages[order]) >= 0).all()
    np.testing.assert_allclose(group_advantages(rewards + 3, kind), advantages, atol=1e-5)


@pytest.mark.parametrize("rewards", [[0.1] * 7, [1.0], []])
def test_nothing_to_learn_is_exactly_zero(rewards):
    assert group_advantages(np.array(rewards), "grpo").tolist() == [0.0] * len(rewards)


def test_unknown_kind():
    with pytest.raises(ValueError, match="'median'"):
        group_advantages(np.array([0.0, 1.0]), "median")
