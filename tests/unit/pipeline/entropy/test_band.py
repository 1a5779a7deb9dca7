import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import BandConfig
from pipeline.entropy.band import AutoBand, Band, SetPoint, build_band
from pipeline.evaluation.evaluate import Estimate

EDGE = st.floats(0.01, 5.0)


def test_constant_and_geometric_target():
    band = Band(BandConfig(low=0.2, high=0.8), 100)
    assert band.at(0) == band.at(10_000) == (0.2, 0.8)
    assert band.target(7) == pytest.approx(0.4)


def test_linear_and_cosine():
    config = BandConfig(low=0.6, high=0.7, end_low=0.4, end_high=0.5, schedule_steps=40, schedule="linear")
    linear = Band(config, 1000)
    assert [linear.at(k)[0] for k in (0, 10, 20, 40, 400)] == pytest.approx([0.6, 0.55, 0.5, 0.4, 0.4])
    config.schedule = "cosine"
    cosine = Band(config, 1000)
    assert [cosine.at(k)[0] for k in (0, 20, 40, 400)] == pytest.approx([0.6, 0.5, 0.4, 0.4])
    assert cosine.at(10)[0] == pytest.approx(0.6 - 0.2 * (1 - math.cos(math.pi / 4)) / 2)


def test_schedule_stretches_over_the_run_by_default():
    band = Band(BandConfig(low=0.6, high=0.7, end_low=0.4, end_high=0.5, schedule="linear"), 200)
    assert band.at(100) == pytest.approx((0.5, 0.6))


def test_a_band_is_held_before_it_moves_over_the_rest_of_the_run():
    edges = {"low": 0.6, "high": 0.7, "end_low": 0.4, "end_high": 0.5, "schedule": "linear"}
    band = Band(BandConfig(**edges, hold_steps=60), 100)
    assert [band.at(k)[0] for k in (0, 60, 70, 80, 100, 200)] == pytest.approx([0.6, 0.6, 0.55, 0.5, 0.4, 0.4])
    assert Band(BandConfig(**edges, hold_steps=60, schedule_steps=20), 100).at(70)[0] == pytest.approx(0.5)


def test_the_slope_is_that_of_ln_target_where_a_schedule_moves_and_none_elsewhere():
    edges = {"low": 0.6, "high": 0.7, "end_low": 0.4, "end_high": 0.5}
    band = Band(BandConfig(**edges, hold_steps=60, schedule="cosine"), 100)
    assert band.slope(80) == pytest.approx(math.log(band.target(81) / band.target(80)))
    assert band.slope(80) < -0.005
    assert [band.slope(step) for step in (0, 59, 100, 200)] == [0.0] * 4
    jumping = Band(BandConfig(low=0.5, high=0.6, schedule="piecewise", points=[[10, 0.3, 0.4]]), 100)
    assert jumping.slope(9) == 0.0


def test_piecewise_holds_from_each_point_on():
    band = Band(BandConfig(low=0.5, high=0.6, schedule="piecewise", points=[[10, 0.3, 0.4], [20, 0.1, 0.2]]), 100)
    assert [band.at(k) for k in (0, 9, 10, 19, 20, 99)] == [(0.5, 0.6)] * 2 + [(0.3, 0.4)] * 2 + [(0.1, 0.2)] * 2


@given(
    EDGE, EDGE, EDGE, EDGE, st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 300), st.integers(0, 500)
)
def test_any_schedule_stays_between_its_edges(a, b, c, d, schedule, steps, step):
    (low, high), (end_low, end_high) = sorted((a, b)), sorted((c, d))
    band = Band(BandConfig(low, high, schedule, end_low, end_high, schedule_steps=steps), 100)
    now = band.at(step)
    assert now[0] <= now[1] * (1 + 1e-12)
    assert min(low, end_low) * 0.999999 <= now[0] <= max(low, end_low) * 1.000001
    assert now[0] * 0.999999 <= band.target(step) <= now[1] * 1.000001
    if schedule != "constant" and steps:
        assert band.at(steps) == pytest.approx((end_low, end_high))


def test_set_point_walks_from_the_first_reading():
    point = SetPoint(0.1)
    walk = [point.toward(0.3, 0.5) for _ in range(8)]
    assert walk[:3] == pytest.approx([0.5 * math.exp(-0.1 * k) for k in (1, 2, 3)])
    assert walk[-1] == pytest.approx(0.3)
    assert SetPoint(0.0).toward(0.3, 0.5) == 0.3


def falling(values, floor=(0.1, 0.12)):
    """A run whose entropy falls from 1.0 by .04 an evaluation, and whose pass@16 takes these values."""
    band = build_band(BandConfig(*floor, schedule="auto"), 240)
    for i, value in enumerate(values):
        for _ in range(20):
            band.observe(1.0 - 0.04 * i)
        band.evaluated(20 * i, {16: Estimate(value, value - 0.02, value + 0.02)})
    return band


def test_a_run_finds_its_band_two_evaluations_after_pass_at_k_was_kept_last():
    values = [0.5, 0.8, 0.95, 0.95, 0.95, 0.90, 0.86]
    watched = falling(values[:5])
    assert watched.watching
    assert watched.at(100) == (0.1, 0.12)
    band = falling(values[:6])
    assert not band.watching
    assert band.at(120) == pytest.approx((0.9 * 0.88, 1.1 * 0.88))  # the entropy of the fourth evaluation
    assert "pass@16 is kept down to H=0.88" in band.why
    band.evaluated(140, {16: Estimate(1.0, 0.99, 1.0)})
    assert band.at(140) == pytest.approx((0.9 * 0.88, 1.1 * 0.88)), "a band that was found stays"


def test_a_band_is_not_found_while_pass_at_k_grows_nor_below_the_floor():
    assert falling([0.1 * i for i in range(9)]).watching
    assert falling([0.5, 0.8, 0.95, 0.95, 0.95, 0.90, 0.86], floor=(2.0, 2.2)).at(120) == (2.0, 2.2)


def test_a_band_that_watches_goes_on_from_its_state():
    values = [0.5, 0.8, 0.95, 0.95, 0.95]
    first, second = falling(values), AutoBand(BandConfig(0.1, 0.12, schedule="auto"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for band in (first, second):
        band.evaluated(100, {16: Estimate(0.9, 0.88, 0.92)})
    assert first.state_dict() == second.state_dict()
    assert not second.watching


def test_an_evaluation_before_the_first_reading_counts_for_nothing():
    band = build_band(BandConfig(0.1, 0.12, schedule="auto"), 240)
    band.evaluated(0, {16: Estimate(0.9, 0.8, 1.0)})
    assert band.measured == []
