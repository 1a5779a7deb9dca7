"""Charts of characters, dot by dot."""

import numpy as np
import pytest

from pipeline.monitoring.text_chart import LABEL, Area, Line, TextChart


def chart(columns=4, rows=2, first=0, last=7, ascii_only=False, colour=False):
    return TextChart(columns, rows, first, last, ascii_only=ascii_only, colour=colour)


def drawn(texts):
    return [text.plain[LABEL:] for text in texts]


def line(values, style=""):
    return Line(np.arange(len(values)), np.array(values, dtype=float), style)


def test_a_rising_line_touches_every_column_and_climbs():
    top, bottom = drawn(chart().draw([line(range(8))]))
    assert all(above + below != "  " for above, below in zip(top, bottom, strict=True))
    assert (top[0], top[-1] == " ", bottom[0] == " ", bottom[-1]) == (" ", False, False, " ")


def test_a_constant_lies_in_the_middle_and_the_scale_names_the_ends():
    texts = chart(rows=1).draw([line([2.0] * 8)])
    assert drawn(texts) == ["⠤⠤⠤⠤"]
    labels = [text.plain[:LABEL].strip() for text in chart().draw([line([0.0, 10.0])])]
    assert labels == ["10.5", "0"]  # five per cent of air, but not below zero


def test_a_gap_stays_a_gap():
    (text,) = chart(rows=1, ascii_only=True).draw(
        [line([1, 1, float("nan"), float("nan"), float("nan"), float("nan"), 1, 1])]
    )
    assert drawn([text]) == ["*  *"]


@pytest.mark.parametrize(("ascii_only", "shade"), [(True, ":"), (False, "░")])
def test_the_area_is_shaded_without_colour_and_never_vanishes(ascii_only, shade):
    edges = np.array([0, 7])
    area = Area(edges, np.array([5.0, 5.0]), np.array([5.01, 5.01]), "green")  # far thinner than a cell
    texts = chart(rows=4, ascii_only=ascii_only).draw([line([0.0] * 2)], area)
    assert sum(row.count(shade) for row in drawn(texts)) == 4


def test_with_colour_the_area_is_a_background():
    area = Area(np.array([0, 7]), np.array([0.0, 0.0]), np.array([1.0, 1.0]), "green")
    texts = chart(colour=True).draw([line([0.0, 1.0], "red")], area)
    assert drawn(texts)[0].count("░") == 0
    assert any(
        span.style.bgcolor is not None for text in texts for span in text.spans if not isinstance(span.style, str)
    )


def test_nothing_to_draw():
    assert drawn(chart().draw([line([float("nan")] * 3)])) == ["    ", "    "]
