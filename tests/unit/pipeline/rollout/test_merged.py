"""Several iterators are drawn from at once."""

import threading

import pytest

from pipeline.rollout.merged import Merged


def test_items_come_as_they_are_there_and_more_iterators_join():
    gate = threading.Event()

    def slow():
        gate.wait(10)
        yield "slow"

    merged = Merged()
    merged.add(slow())
    merged.add(iter(["first"]))
    assert merged.next() == "first"
    merged.add(iter(["joined"]))
    assert merged.next() == "joined"
    gate.set()
    assert [merged.next(), merged.next()] == ["slow", None]


def test_what_one_raises_is_raised_once_the_others_have_ended():
    def fails():
        raise ValueError("broken")
        yield

    merged = Merged()
    merged.add(fails())
    merged.add(iter([1, 2]))
    assert [merged.next(), merged.next()] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        merged.next()
