import numpy as np
import pytest

from pipeline.entropy.target import Measured, annealed, recommend, slower, smoothed


def curve(values, entropies=None, error=0.01):
    entropies = np.linspace(1.0, 0.2, len(values)) if entropies is None else entropies
    half = 1.96 * error
    return [Measured(20 * i, h, v, v - half, v + half) for i, (v, h) in enumerate(zip(values, entropies, strict=True))]


def test_the_last_within_one_standard_error_of_the_best_is_chosen():
    points = curve([0.5, 0.7, 0.9, 0.935, 0.945, 0.95, 0.945, 0.90, 0.86, 0.82])
    found = recommend(points, 16)
    assert found.smooth == pytest.approx(smoothed([point.value for point in points]))
    assert (found.step, found.entropy) == (100, points[5].entropy)  # smoothed .947; at step 120 .932
    assert (found.low, found.high) == pytest.approx((0.9 * found.entropy, 1.1 * found.entropy))
    assert found.loss_is_seen
    assert not found.kept_to_the_end
    assert "lost 0.107" in found.verdict()
    assert found.highest == points[4].entropy  # smoothed .943; one evaluation before .927
    assert "pass@16 was as high from H=0.644 on" in found.verdict()


def test_a_run_that_gains_to_its_end_needs_no_control():
    found = recommend(curve(np.linspace(0.1, 0.6, 10)), 1)
    assert found.kept_to_the_end
    assert "lost nothing that a band would have kept" in found.verdict()


def test_a_model_that_only_loses_is_held_where_it_starts():
    found = recommend(curve(np.linspace(0.95, 0.6, 10)), 256)
    assert found.step == 0
    assert "Try a lower band, too" in found.verdict()
    assert "Try a lower band" not in recommend(curve([0.5, 0.7, 0.9, 0.95, 0.95, 0.9, 0.8, 0.7]), 16).verdict()


def test_what_is_good_again_after_a_fall_is_not_chosen():
    assert recommend(curve([0.8, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.89, 0.89, 0.89]), 16).step == 40


def test_a_loss_within_noise_is_no_reason_for_control():
    found = recommend(curve([0.5, 0.7, 0.9, 0.95, 0.95, 0.94, 0.94, 0.93, 0.93], error=0.012), 16)
    assert "is not shown to pay" in found.verdict()


def test_the_schedule_goes_where_pass_at_1_went_on_growing():
    points = curve([0.5, 0.7, 0.9, 0.95, 0.95, 0.95, 0.94, 0.90, 0.86])
    found = recommend(points, 16)
    growing = curve(np.linspace(0.1, 0.6, 9))
    schedule = annealed(found, growing, 240)
    assert schedule.entropy == growing[-1].entropy
    assert "entropy.band.hold_steps=120" in schedule.overrides
    assert "entropy.band.end_low=0.18" in schedule.overrides
    assert annealed(found, curve([0.3] * 9), 240) is None
    assert annealed(recommend(growing, 1), growing, 240) is None
    spent = curve(np.linspace(0.1, 0.6, 9), [*(point.entropy for point in points[:-1]), 0.0])
    assert annealed(found, spent, 240) is None, "there is no band at 0"
    lost = curve(
        np.linspace(0.1, 0.6, 9), [*(point.entropy for point in points[:-1]), float("nan")]
    )  # no reading there
    assert "nan" not in " ".join(annealed(found, lost, 240).overrides)


def test_a_run_that_stands_still_with_its_entropy_spent_is_lowered_slowly():
    values = [0.1, 0.2, 0.3, 0.35, 0.36, 0.37, 0.37, 0.37, 0.38, 0.375]
    spent = np.geomspace(0.8, 0.07, 10)
    found = slower(curve(values, spent))
    assert found.since == 120
    assert found.left == pytest.approx(0.07 / 0.8)
    assert found.overrides == (
        "entropy.actuator=clip_cov",
        "entropy.band.low=0.504",
        "entropy.band.high=0.616",
        "entropy.band.end_low=0.144",
        "entropy.band.end_high=0.176",
        "entropy.band.schedule=linear",
    )
    assert slower(curve(values, np.geomspace(0.8, 0.2, 10))) is None, "entropy is left: it is not what is lacking"
    assert slower(curve(np.linspace(0.1, 0.5, 10), spent)) is None, "it still gains"
    assert slower(curve(values[:4], spent[:4])) is None


def test_of_a_run_whose_entropy_rises_no_fall_is_told():
    found = recommend(curve([0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6], np.linspace(0.3, 0.9, 7)), 16)
    assert "kept up to H=0.5" in found.verdict()
    assert "does not show what a lower one costs" in found.verdict()


def test_noise_does_not_choose_a_target_far_from_the_truth():
    """pass@k rises to H = 0.4 and falls again, in noise of one standard error."""
    entropies = np.geomspace(1.0, 0.15, 14)
    truth = 0.95 - 0.25 * np.log(entropies / 0.4) ** 2
    rng = np.random.default_rng(0)
    chosen = [recommend(curve(truth + 0.01 * rng.standard_normal(14), entropies), 16).entropy for _ in range(200)]
    regret = [0.25 * np.log(h / 0.4) ** 2 for h in chosen]
    assert np.mean(regret) < 0.015
    assert np.quantile(chosen, 0.05) > 0.3
    assert np.quantile(chosen, 0.95) < 0.8


def test_too_few_evaluations_are_refused():
    with pytest.raises(ValueError, match="pass@16 and an entropy: 4, at least 5 are needed"):
        recommend(curve([0.1, 0.2, 0.3, 0.4]), 16)
    with pytest.raises(ValueError, match="at least 5"):
        recommend(curve([0.1, 0.2, 0.3, 0.4, float("nan")]), 16)
