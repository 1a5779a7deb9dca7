import math

import numpy as np
import pytest

from pipeline.entropy.reward_law import fit_reward_law


def test_an_exact_law_is_found_and_predicts_itself():
    entropy = np.linspace(0.6, 0.1, 120)
    fit = fit_reward_law(entropy, 1.2 - 0.5 * np.exp(entropy))
    assert (fit.a, fit.b, fit.ceiling) == pytest.approx((0.5, 1.2, 0.7), abs=2e-3)
    assert fit.early_error < 2e-3
    assert fit.early_ceiling == pytest.approx(0.7, abs=5e-3)
    assert fit.points == 60  # means of two steps each
    assert fit.entropies == pytest.approx((0.1, 0.6), abs=0.01)


def test_three_points_by_hand():
    # exp(H) = 1, 2, 3 and R = 5, 3, 2 (each three times): slope -1.5, intercept 6 + 1/3.
    entropy = [0.0, math.log(2), math.log(3)] * 3
    fit = fit_reward_law(entropy, [5, 3, 2] * 3)
    assert fit.a == pytest.approx(1.5)
    assert fit.b == pytest.approx(6 + 1 / 3)
    assert fit.ceiling == pytest.approx(4 + 5 / 6)
    assert fit.residual == pytest.approx(math.sqrt(((1 / 6) ** 2 + (1 / 3) ** 2 + (1 / 6) ** 2) / 3))


def test_the_interval_of_the_ceiling_holds_the_truth():
    entropy = np.linspace(0.6, 0.1, 200)
    rng = np.random.default_rng(0)
    fits = [fit_reward_law(entropy, 1.2 - 0.5 * np.exp(entropy) + 0.05 * rng.standard_normal(200)) for _ in range(60)]
    assert 0.85 <= np.mean([f.ceiling_interval[0] <= 0.7 <= f.ceiling_interval[1] for f in fits]) <= 1


def test_a_law_that_changes_on_the_way_shows_as_early_error():
    entropy = np.linspace(0.6, 0.1, 100)
    reward = np.where(np.arange(100) < 15, 1.2 - 0.5 * np.exp(entropy), 0.3)
    assert fit_reward_law(entropy, reward).early_error > 0.1


def test_missing_pairs_are_left_out_and_too_few_refused():
    entropy = np.linspace(0.6, 0.1, 40)
    reward = 1.2 - 0.5 * np.exp(entropy)
    entropy[::4] = math.nan
    assert fit_reward_law(entropy, reward).a == pytest.approx(0.5)
    with pytest.raises(ValueError, match="7 steps"):
        fit_reward_law([0.3] * 7, [0.5] * 7)
