import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import BandConfig, EntropyConfig, PiConfig
from pipeline.entropy.band import AutoBand, Band, SetPoint, build_band
from pipeline.entropy.factory import build_controller
from pipeline.entropy.target import Measured, recommend
from pipeline.evaluation.evaluate import Estimate
from pipeline.types import EntropyReading

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


def estimate(value):
    return {16: Estimate(value, value - 0.02, value + 0.02)}


def falling(values, floor=(0.1, 0.12)):
    """A run whose entropy falls from 1.0 by .04 an evaluation, and whose pass@16 takes these values."""
    band = build_band(BandConfig(*floor, schedule="auto"), 240)
    for i, value in enumerate(values):
        for step in range(20 * i, 20 * i + 20):
            band.observe(step, 1.0 - 0.04 * i)
        band.evaluated(20 * i + 20, estimate(value))
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
    band.evaluated(140, estimate(1.0))
    assert band.at(140) == pytest.approx((0.9 * 0.88, 1.1 * 0.88)), "a band that was found stays"


def test_a_band_is_not_found_while_pass_at_k_grows_nor_below_the_floor():
    assert falling([0.1 * i for i in range(9)]).watching
    assert falling([0.5, 0.8, 0.95, 0.95, 0.95, 0.90, 0.86], floor=(2.0, 2.2)).at(120) == (2.0, 2.2)


def test_a_band_that_watches_goes_on_from_its_state():
    values = [0.5, 0.8, 0.95, 0.95, 0.95]
    first, second = falling(values), AutoBand(BandConfig(0.1, 0.12, schedule="auto"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for band in (first, second):
        band.evaluated(120, estimate(0.9))
    assert first.state_dict() == second.state_dict()
    assert not second.watching


def test_an_evaluation_before_the_first_reading_counts_for_nothing():
    band = build_band(BandConfig(0.1, 0.12, schedule="auto"), 240)
    band.evaluated(0, estimate(0.9))
    assert band.measured == []
    band.observe(0, 1.0)
    band.evaluated(0, estimate(0.9))
    assert band.measured == [], "nor one that was judged after the first step, which trained beside it"


def test_an_evaluation_has_the_entropies_before_it_whether_or_not_a_step_was_trained_beside():
    found = []
    for beside in (False, True):
        band = build_band(BandConfig(0.1, 0.12, schedule="auto"), 240)
        for step in range(20 + beside):
            band.observe(step, 1.0 - 0.01 * step)
        band.evaluated(20, estimate(0.9))
        found.append(band.measured)
    assert found[0] == found[1]
    assert found[0][0].entropy == pytest.approx(1.0 - 0.01 * 14.5)


def test_a_state_whose_readings_have_no_steps_is_no_state():
    band = build_band(BandConfig(0.1, 0.12, schedule="auto"), 240)
    with pytest.raises(ValueError, match="recent_steps"):
        band.load_state_dict({**band.state_dict(), "recent": [1.0]})


def watched(floor=(0.1, 0.12), **keys):
    """A controller under a band that is watched for, and that band."""
    config = EntropyConfig(band=BandConfig(*floor, schedule="auto"), actuator="resample", **keys)
    band = build_band(config.band, 240)
    return build_controller(config, band, 16), band


def feed(control, entropies, start=0, positives=5):
    return [control.update(EntropyReading(100 * h, 100, start + k), positives) for k, h in enumerate(entropies)]


@pytest.mark.parametrize("ramp", [0.0, 0.02])
def test_an_entropy_that_falls_to_a_low_floor_while_a_band_is_watched_for_never_explodes(ramp):
    control, band = watched(pi=PiConfig(setpoint_ramp=ramp, ema=0.0))
    falling = feed(control, [math.exp(-0.02 * step) for step in range(100)])
    assert {(d.state, d.command) for d in falling} == {("holding", 1.0)}
    # Down at the floor, which is held, and up again: still there is no band that it could be above.
    feed(control, [0.1] * 9, start=100)
    assert {d.command for d in feed(control, [0.6] * 9, start=109)[-5:]} == {1.0}
    assert band.watching


def test_nothing_is_drawn_more_while_a_band_is_watched_for_and_no_answer_is_right():
    control, _ = watched(pi=PiConfig(split_range=True))
    decisions = feed(control, [0.6] * 20, positives=0)
    assert {(d.command, d.auxiliary_prompts) for d in decisions} == {(1.0, decisions[0].auxiliary_prompts)}


def test_the_set_point_walks_from_the_entropy_once_the_band_is_found():
    control, band = watched(pi=PiConfig(setpoint_ramp=0.02, ema=0.0))
    feed(control, [0.6] * 80)
    band.found = recommend([Measured(step, 0.9, 0.5, 0.48, 0.52) for step in range(5)], 16)
    targets = [decision.target for decision in feed(control, [0.6] * 3, start=80)]
    assert targets == pytest.approx([0.6 * math.exp(0.02 * k) for k in (1, 2, 3)])
