"""The probe's arithmetic; that it measures from one state is tested on a real model."""

import math

import pytest

from pipeline.evaluation.probe import Asymmetry, Effect


def asymmetry(*effects):
    return Asymmetry(0.5, 0.1, [Effect(math.exp(x), "positives", y, 0.0, 1.0, repeats) for x, y, repeats in effects])


def test_the_slope_is_of_the_temperatures_that_had_rows():
    """Least squares of (0, 1), (1, 2), (2, 6): 5 over the sum of squares 2; at the hottest nothing was correct."""
    assert asymmetry((0, 1, 2), (1, 2, 2), (2, 6, 1), (3, math.nan, 0)).slope("positives") == pytest.approx(2.5)
    assert math.isnan(asymmetry((0, 1, 2), (1, math.nan, 0)).slope("positives"))
    assert math.isnan(asymmetry((0, 1, 2), (1, 2, 2)).slope("negatives"))
