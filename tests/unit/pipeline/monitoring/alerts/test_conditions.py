"""Each way to look at a figure, with numbers by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.monitoring.alerts.conditions import Condition, Moment
from pipeline.monitoring.alerts.messages import fill
from pipeline.monitoring.alerts.schema import ConditionConfig


def looks(values, **config):
    """Findings of a condition on metric x/y that sees ``values`` one step each."""
    condition = Condition(ConditionConfig(metric="x/y", **config))
    figures = [{} if value is None else {"x/y": value, "x/half": 0.5} for value in values]
    return [condition.look(Moment(figure, None, step)) for step, figure in enumerate(figures, start=1)]


def holds(values, **config):
    return [found.holds for found in looks(values, **config)]


def test_above_below_and_outside():
    values = [0.4, 0.5, 0.6, None]
    assert holds(values, above="0.5") == [False, False, True, None]
    assert holds(values, below="1 * x/half") == [True, False, False, None]
    assert holds(values, above="x/half", below="x/half") == [True, False, True, None]
    assert [str(found.bound) for found in looks(values[:3], above="0.55", below="0.45")] == ["0.45", "0.55", "0.55"]


def test_a_bound_without_a_value_is_not_crossed():
    assert holds([5.0], above="no/such") == [None]
    assert holds([5.0], above="no/such", below="6") == [True]


def test_smoothing_is_an_average_that_forgets():
    values = [found.value for found in looks([1.0, 2.0, 2.0], above="0", smooth=0.8)]
    assert values == pytest.approx([1.0, 1.2, 1.36])


def test_mean_waits_for_its_window():
    assert holds([1.0, 3.0, 5.0], above="1.5", take="mean", window=2) == [None, True, True]


def test_rate_is_the_slope_of_the_logarithm():
    values = [math.exp(-0.02 * step) for step in range(5)]
    found = looks(values, below="-0.01", take="rate", window=4)
    assert [finding.holds for finding in found] == [None, None, None, True, True]
    assert found[-1].value == pytest.approx(-0.02)
    assert holds([-1.0, -1.0], below="0", take="rate", window=2) == [None, None]
    assert holds([1.0, 0.0], below="-1", take="rate", window=2) == [None, True]


@given(st.lists(st.floats(0.01, 100), min_size=6, max_size=6))
def test_rate_is_numpys_line(values):
    slope = np.polyfit(range(6), np.log(values), 1)[0]
    assert looks(values, below="0", take="rate", window=6)[-1].value == pytest.approx(slope, abs=1e-9)


def test_of_best_remembers_the_best_mean():
    found = looks([4.0, 4.0, 1.0, 1.0, 2.0], below="0.5", take="of_best", window=2)
    assert [finding.value for finding in found[1:]] == pytest.approx([1.0, 1.0, 0.25, 0.625])  # 1.5 + 2 x 0.5


def test_of_best_counts_negative_figures_from_their_floor():
    found = looks([-0.5, 0.0, -0.8], below="0.5", take="of_best", window=1)
    assert [finding.value for finding in found] == pytest.approx([1.0, 1.0, 0.2])


def test_of_best_is_not_alarmed_by_noise():
    rng = np.random.default_rng(0)
    for mean, spread in ((0.02, 0.08), (0.01, 0.008)):  # of -1 and 1, half of them right; of a hard task
        values = mean + spread * rng.standard_normal(600)
        assert True not in holds(values.tolist(), below="0.75", take="of_best", window=20)


def test_of_first_remembers_the_first_mean():
    found = looks([1.0, 3.0, 5.0, 7.0], above="2.5", take="of_first", window=2)
    assert [finding.value for finding in found[1:]] == pytest.approx([1.0, 2.0, 3.0])


def test_swings_count_passes_from_side_to_side():
    config = {"above": "1", "below": "-1", "swings": 2, "window": 5}
    values = [2, 0, 2, -2, 0, 0, 2, 0, 0, 0]  # passes at steps 4 and 7; crossing into the middle is none
    assert holds(values, **config) == [False] * 6 + [True, True, False, False]


def test_events_are_remembered_for_some_steps():
    condition = Condition(ConditionConfig(event="fault", window=2))
    kinds = ["step", "fault", "step", "step", "step"]
    steps = [1, 1, 2, 3, 4]
    moments = [Moment({}, {"kind": kind}, step) for kind, step in zip(kinds, steps, strict=True)]
    assert [condition.look(moment).holds for moment in moments] == [False, True, True, False, False]


def test_the_controllers_words():
    def look(config, **event):
        return Condition(ConditionConfig(**config)).look(Moment({}, event or None, 1)).holds

    said = {"state": "saturated", "reason": "at its limit, on its way to 0.3"}
    assert look({"state": "saturated"}, **said) is True
    assert look({"state": "tracking"}, **said) is False
    assert look({"reason": "on its way"}, **said) is True
    assert look({"state": "saturated", "without": "on its way"}, **said) is False
    assert look({"state": "saturated"}) is None


def test_messages_fill_in_whatever_there_is():
    fields = {"entropy/mean": 0.12345, "loss": None, "grad_norm": math.inf, "state": "off"}
    template = "H={entropy/mean:.2g} loss {loss:.3f} norm {grad_norm} {no/such:.1f} {state:.1f}"
    assert fill(template, fields) == "H=0.12 loss not finite norm not finite unknown off"
