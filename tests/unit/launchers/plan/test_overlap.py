"""The simulation of overlapped steps, by cases that can be worked out by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.plan.check_costs import overlap
from launchers.plan.overlap import Plant, heavy_tailed, predict
from launchers.plan.setting import prepared
from launchers.slurm.cluster import load_cluster

# One engine that runs the four samples of a step at a time, a pass a second.
PLANT = Plant(
    engines=1,
    kv_tokens=10**9,
    most_running=4,
    decode=lambda running, context: 1.0,
    prefill=lambda tokens: 0.0,
    train=50.0,
    sync=7.0,
    prompt=10,
    groups=(2, 2),
)


def constant(length):
    return lambda count: np.full(count, float(length))


def seconds(staleness, *, partial=False, length=100.0, lengths=None, **changes):
    return predict(replace(PLANT, **changes), lengths or constant(length), staleness, partial=partial).step_seconds


@pytest.mark.parametrize("partial", [False, True])
def test_without_staleness_a_step_is_the_sum(partial):
    found = predict(PLANT, constant(100), 0, partial=partial)
    assert found.step_seconds == pytest.approx(100 + 50 + 7)
    assert found.learner_waits == pytest.approx(100 / 157)
    assert found.engines_wait == pytest.approx(57 / 157)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("staleness", [1, 4])
@pytest.mark.parametrize("train", [50.0, 100.0, 130.0])
def test_with_staleness_a_step_is_the_longer_of_the_two_and_the_sync(staleness, partial, train):
    assert seconds(staleness, partial=partial, train=train) == pytest.approx(max(100, train) + 7)


def test_the_prompt_is_read_once_for_a_group():
    assert seconds(0, prefill=lambda tokens: tokens / 10) == pytest.approx(2 * 1 + 100 + 50 + 7)


def test_what_the_cache_does_not_hold_waits():
    assert seconds(0, kv_tokens=220) == pytest.approx(2 * 100 + 50 + 7)
    assert seconds(0, kv_tokens=10) == pytest.approx(4 * 100 + 50 + 7)  # one at a time, whatever the cache holds
    assert seconds(0, engines=2, most_running=2) == pytest.approx(100 + 50 + 7)
    assert seconds(0, engines=2, most_running=1) == pytest.approx(2 * 100 + 50 + 7)


def test_passes_grow_with_the_context():
    """A pass over four samples takes their tokens / 1000: 100 passes over 10 to 110 tokens each."""
    grown = seconds(0, decode=lambda running, context: running * context / 1000)
    assert grown == pytest.approx(100 * 4 * 60 / 1000 + 50 + 7)


def alternating():
    """One sample of 400 tokens, then three of 100, again and again."""
    number = iter(range(10**6))
    return lambda count: np.array([400.0 if next(number) % 4 == 0 else 100.0 for _ in range(count)])


def test_held_answers_do_not_keep_the_others_waiting():
    """Each step has 700 tokens for four places: 175 s where no place is ever empty. The longest alone takes 400 s."""
    places = {"train": 10.0, "sync": 0.0}
    assert seconds(0, lengths=alternating(), **places) == pytest.approx(410)
    waiting = seconds(4, lengths=alternating(), **places)
    held = seconds(4, lengths=alternating(), partial=True, **places)
    assert 175 <= held < 200 < waiting < 410


def test_held_answers_are_read_again():
    """Two places, of which one is held by each sync: its text is read again, a second a token."""
    free = seconds(4, lengths=alternating(), partial=True)
    read = seconds(4, lengths=alternating(), partial=True, prefill=lambda tokens: tokens / 20)
    assert free + 1 < read


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.booleans(),
    st.floats(1, 300),
    st.floats(0, 30),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_bounds_and_admission(engines, staleness, partial, train, sync, groups, seed):
    plant = replace(PLANT, engines=engines, train=train, sync=sync, groups=groups)
    found = predict(plant, heavy_tailed(80, 400, seed), staleness, partial=partial)
    assert found.step_seconds >= train + sync - 1e-6
    assert -1e-9 <= found.learner_waits <= 1
    assert -1e-9 <= found.engines_wait <= 1
    assert predict(plant, heavy_tailed(80, 400, seed), staleness, partial=partial) == found


@pytest.mark.parametrize("mean", [50, 500, 2500, 6000])
def test_lengths_have_the_mean_after_the_cut(mean):
    drawn = heavy_tailed(mean, 8192)(200_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert drawn.max() <= 8192
    assert drawn.min() >= 1


def told(*overrides):
    with prepared(Path("recipe/qwen3-32b.yaml"), overrides, load_cluster(Path("cluster/plain.yaml"))) as setting:
        return list(overlap(setting))


def test_a_plan_says_what_each_way_would_take_and_who_waits():
    """An eighth of the recipe's rows on an eighth of its engines: some 50 ms a way."""
    first, turns, *others = told("rollout.prompts_per_step=16", "rollout.engines=1")
    assert "log-normal responses, sigma 0.8, at most 8,192 tokens" in first
    assert turns.startswith("overlap: staleness 0, in turns (`step:` with such lengths): ")
    assert [line.partition(":")[2].rpartition(":")[0] for line in others] == [
        f" staleness {s}, running answers {how}"
        for s in (1, 4)
        for how in ("end before a sync", "held by a sync and continued")
    ]
    assert all("; the learner waits " in line and "% of the time, the engines " in line for line in (turns, *others))


@pytest.mark.parametrize(
    "overrides",
    [
        ("rollout.placement=colocated", "rollout.sglang.mem_fraction_static=0.5"),  # they share GPUs
        ("rollout.sglang.mem_fraction_static=0.19",),  # no room for the weights
    ],
    ids=["colocated", "no room"],
)
def test_nothing_is_said_where_nothing_can_overlap(overrides):
    assert told(*overrides) == []
