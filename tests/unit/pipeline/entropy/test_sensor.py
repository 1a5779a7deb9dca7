"""The filter between a reading and the law."""

import math

import numpy as np
import pytest

from pipeline.entropy.sensor import HAMPEL_WINDOW, Sensor


def test_a_repeated_reading_is_brought_to_the_level_of_the_others_and_keeps_its_calm():
    rng = np.random.default_rng(0)
    truth = 0.5 * np.exp(-0.005 * np.arange(200))
    sensor = Sensor(0.7, HAMPEL_WINDOW)
    seen = [sensor.filter(h * math.exp(0.06 * rng.standard_normal()), 1.3 * h) for h in truth]
    error = np.log(seen[40:] / truth[40:])
    assert np.abs(error).max() < 0.03, "of readings that vary by 6 %"
    assert np.diff(error).std() < 0.005


def test_the_first_reading_is_taken_as_it_is():
    assert Sensor(0.7).filter(0.4, 0.8) == pytest.approx(0.4)


def test_an_offset_that_moves_is_followed():
    sensor = Sensor(0.7)
    for _ in range(100):
        sensor.filter(0.3, 0.3)
    for _ in range(100):
        last = sensor.filter(0.3, 0.25)
    assert last == pytest.approx(0.3, rel=0.002)


def test_a_step_without_a_repeated_reading_goes_on_from_the_last_value():
    sensor = Sensor(0.7)
    for _ in range(50):
        sensor.filter(0.3, 0.6)
    assert sensor.filter(0.4) == pytest.approx(0.7 * 0.3 + 0.3 * 0.4)
    assert sensor.filter(0.3, 0.6) == pytest.approx(0.3, rel=0.01)


def test_state_continues_exactly():
    one, two = Sensor(0.7, HAMPEL_WINDOW), Sensor(0.7, HAMPEL_WINDOW)
    for k in range(30):
        one.filter(0.3 + 0.01 * (k % 3), 0.5)
    two.load_state_dict(one.state_dict())
    assert [one.filter(0.31, h) for h in (0.49, None, 0.52)] == [two.filter(0.31, h) for h in (0.49, None, 0.52)]


def test_held_on_repeated_prompts_the_steps_own_move_nothing():
    sensor = Sensor(0.7, 7, of_repeated=True)
    assert sensor.filter(0.4, 0.3) == 0.3
    for own in (0.5, 0.6, 0.7, 0.8):
        assert sensor.filter(own, 0.3) == 0.3
    assert sensor.filter(0.9) == 0.3  # a repeated sample was lost
