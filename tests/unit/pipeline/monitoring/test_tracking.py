"""Band tracking by hand. Band [0.8, 1.25]: its geometric middle is 1."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.monitoring.tracking import STAY, filtered, track, waiting


def figures(entropies, **more):
    return track(entropies, [0.8] * len(entropies), [1.25] * len(entropies), **more)


def test_the_filter_by_hand():
    assert filtered([1.0, 2.0, 0.0]) == pytest.approx([1.0, 1.2, 0.96])
    assert filtered([math.nan, 2.0, math.nan, 1.0])[1:] == pytest.approx([2.0, 2.0, 1.8])


def test_a_constant_run_in_the_middle_is_perfect():
    result = figures([1.0] * 30)
    assert (result.entry_step, result.settling_step, result.time_in_band) == (0, 0, 1.0)
    assert (result.rms_error, result.bias, result.overshoot, result.oscillation) == (0, 0, 0, 0)


def test_a_step_down_into_the_band():
    result = figures([2.0] + [1.0] * 40)
    # filtered: 1 + 0.8^k, in the band (<= 1.25) from k = 7: 0.8^6 = 0.262, 0.8^7 = 0.2097
    assert (result.entry_step, result.settling_step, result.time_in_band) == (7, 7, 1.0)
    expected = [0.8**k for k in range(7, 41)]
    assert result.rms_error == pytest.approx(math.sqrt(np.mean(np.square(expected))))
    assert result.rms_error_raw == 0
    assert result.bias == pytest.approx(np.mean(expected))
    assert result.overshoot == 0  # it came from above and never went below the target


def test_overshoot_is_the_far_side_of_the_start():
    result = figures([2.0] * 5 + [0.0] * 4 + [1.0] * 60)
    smooth = filtered([2.0] * 5 + [0.0] * 4 + [1.0] * 60)
    # 2, then 1.6, 1.28, 1.024 (entry at 7), 0.8192, and back toward 1 from below
    assert result.entry_step == 7
    assert result.overshoot == pytest.approx(1 - smooth[8])
    assert smooth[8] == pytest.approx(0.8192)
    assert result.oscillation == pytest.approx(100 * 1 / 62)


def test_leaving_the_band_counts_after_entry_only():
    result = figures([1.0] * 10 + [5.0] * 30)
    assert (result.entry_step, result.settling_step) == (0, None)
    assert result.time_in_band == pytest.approx(10 / 40)


def test_settling_needs_twenty_steps():
    assert figures([1.0] * (STAY - 1)).settling_step is None
    assert figures([1.0] * STAY).settling_step == 0


def test_a_run_that_never_enters():
    result = figures([3.0] * 30)
    assert (result.entry_step, result.settling_step, result.time_in_band) == (None, None, 0.0)
    assert math.isnan(result.rms_error)


def test_a_run_without_steps():
    assert figures([]).time_in_band == 0.0


def test_steps_that_the_log_lacks_count_neither_way():
    gap = [math.nan] * 5
    entropies, edges = [2.0, *[1.0] * 15, *gap, *[1.0] * 20], np.array([1.0] * 16 + gap + [1.0] * 20)
    temperatures = [1.0] * 16 + gap + [1.0] * 20
    torn = track(entropies, 0.8 * edges, 1.25 * edges, temperatures)
    whole = track(entropies[:16] + entropies[21:], [0.8] * 36, [1.25] * 36, [1.0] * 36)
    assert torn == whole


def test_command_figures_by_hand():
    result = figures([1.0] * 4, temperatures=[1.0, math.e, 1.0, 1.0], saturated=[False, True, True, False])
    assert result.temperature_variation == pytest.approx(2 / 3)
    assert result.saturation == 0.5


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=60))
def test_figures_stay_in_their_ranges(entropies):
    result = figures(entropies)
    assert 0 <= result.time_in_band <= 1
    assert (result.entry_step is None) == (result.time_in_band == 0)
    if result.entry_step is not None:
        assert result.rms_error >= abs(result.bias) - 1e-12
        assert result.settling_step is None or result.settling_step >= result.entry_step


@pytest.mark.parametrize(
    ("entropies", "said"),
    [
        ([], ""),
        ([0.3], ""),
        ([5.0] * 30 + [0.3] * 30 + [5.0] * 30, ""),  # it has been there
        ([5.75] * 3, "H 5.75, band 0.25 to 0.35, not coming nearer"),
        ([5.0, 5.5], "H 5.1, band 0.25 to 0.35, not coming nearer"),
        ([6.0, 5.0], "H 5.8, band 0.25 to 0.35, about 28 steps at this drift"),  # (5.8 - 0.35) / 0.2
        ([0.05, 0.1], "H 0.06, band 0.25 to 0.35, about 19 steps at this drift"),
        ([math.nan, 5.75], "H 5.75, band 0.25 to 0.35, not coming nearer"),
    ],
)
def test_what_a_controller_that_waits_is_said_to_do(entropies, said):
    assert waiting(entropies, 0.25, 0.35) == said
