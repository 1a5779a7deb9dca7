"""Who was at work when: lanes and idle shares of a step, and the stretches that they are made of."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clock import Busy, StepClock, length
from pipeline.monitoring.timeline import ENGINES, timed, timeline

TICKS = 40  # of a step that takes as many seconds


class At(StepClock):
    """The clock of a step that began at 0, with given spans."""

    def __init__(self, **phases):
        super().__init__()
        self.started, self._spans = 0.0, {phase: list(spans) for phase, spans in phases.items()}


@st.composite
def spans(draw, first=-5, last=TICKS + 5):
    """In order and apart, some of them before or behind the step."""
    edges = sorted(draw(st.sets(st.integers(first, last), max_size=10)))
    return [(float(a), float(b)) for a, b in zip(edges[::2], edges[1::2], strict=False)]


def ticks(of):
    return {tick for begin, end in of for tick in range(int(begin), int(end)) if 0 <= tick < TICKS}


@given(train=spans(), cut=st.integers(0, TICKS), engines=st.lists(spans(), min_size=1, max_size=3))
def test_lanes_and_idle_shares_count_every_second_once(train, cut, engines):
    train = [(begin, min(end, float(cut))) for begin, end in train if begin < cut]
    sync = [(float(cut), TICKS - 1.0)] if cut < TICKS - 1 else []
    lanes, idle = timeline(At(train=train, sync=sync), engines, float(TICKS))
    drawing = [ticks(each) - ticks(sync) for each in engines]
    assert ticks(lanes["learner"]) == ticks(train)
    assert [ticks(lanes[f"engine {i}"]) for i in range(len(engines))] == drawing
    assert idle["learner"] == pytest.approx(1 - len(ticks(train) | ticks(sync)) / TICKS)
    assert idle["engines"] == pytest.approx(1 - sum(map(len, drawing)) / len(engines) / TICKS)


def test_a_lane_has_few_spans_however_often_work_pauses():
    often = [(at / 100, at / 100 + 0.0099) for at in range(100)]
    lanes, idle = timeline(At(train=often), [often] * (ENGINES + 9), 1.0)
    assert lanes["learner"] == [(0.0, 0.9999)]
    assert sum(name.startswith("engine") for name in lanes) == ENGINES
    assert idle["engines"] == pytest.approx(0.01), "also of engines without a lane"


def test_without_engines_nobody_says_that_they_idle():
    assert timeline(At(), [], 1.0) == ({"learner": [], "sync": []}, {"learner": 1.0})


def test_only_steps_that_have_a_timeline_are_drawn():
    event = {"step": 3, "began": 10.0, "time": 12.0, "idle": {"learner": 1.0}, "timeline": {"learner": []}}
    drawn = {"step": 3, "began": 10.0, "seconds": 2.0, "idle": {"learner": 1.0}, "lanes": {"learner": []}}
    assert timed([None, event, {"step": 4, "began": None, "time": 12.0}]) == [drawn]


def test_somebody_is_busy_while_anybody_is_within():
    busy, first, second = Busy(), threading.Event(), threading.Event()

    def work(begun, ends):
        with busy:
            begun.set()
            ends.wait(10)

    ends = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=work, args=pair) for pair in zip((first, second), ends, strict=True)]
    for thread, begun in zip(threads, (first, second), strict=True):
        thread.start()
        begun.wait(10)
    ((begun, cut),) = busy.take()
    ends[0].set()
    threads[0].join()
    ends[1].set()
    threads[1].join()
    ((again, end),) = busy.take()
    assert begun < cut == again < end, "what goes on is cut, not counted twice"
    assert busy.take() == []


def test_the_seconds_of_a_phase_are_those_of_its_spans():
    clock = StepClock()
    for _ in range(3):
        with clock("train"):
            time.sleep(0.001)
    assert len(clock.spans("train")) == 3
    assert clock.seconds()["train"] == length(clock.spans("train")) >= 0.003
    assert clock.spans("sync") == []
