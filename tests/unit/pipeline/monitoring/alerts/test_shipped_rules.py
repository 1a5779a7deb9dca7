"""Each shipped rule on a trace made by hand: when it begins, when it ends, what leaves it silent."""

import math
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import AlertsConfig
from pipeline.monitoring.alerts.engine import AlertEngine
from pipeline.monitoring.alerts.rules import load_rules

sys.path.append(str(Path(__file__).parent))
import alert_events as a

RULES = load_rules(AlertsConfig())


def engine(**constants):
    return AlertEngine(RULES, {"checkpoint/every": 10.0, **constants})


def steps(count, first=0, **changes):
    """Steps on track, changed: a function is asked with the number since the first."""
    made = [{k: v(i) if callable(v) else v for k, v in changes.items()} for i in range(count)]
    return [a.step(first + i, **made[i]) for i in range(count)]


def said(events, rules=None):
    found = a.run(rules or engine(**{"checkpoint/every": 1e9}), events)
    return [(step, rule, state) for step, rule, state in found]


def test_on_track_nothing_is_said():
    swinging = steps(400, entropy=lambda i: 0.3 * math.exp(0.07 * (-1) ** i))
    assert said(swinging) == []


def test_out_of_band_after_twenty_steps_until_ten_back_in():
    # smoothed by 0.8: 0.3 -> 0.336 at the 2nd step of 0.40; back: 0.33 is passed at the 6th step of 0.3
    events = [*steps(5), *steps(40, 5, entropy=0.4), *steps(40, 45)]
    assert said(events) == [(5 + 1 + 19, "out_of_band", "begin"), (45 + 5 + 9, "out_of_band", "end")]


@pytest.mark.parametrize("band_of", ["step", "repeated"])
def test_only_the_reading_that_the_band_is_of_can_leave_it(band_of):
    """The step's own rows leave the band, then the repeated prompts do."""
    own = steps(60, 5, entropy=0.4, metrics={"entropy_repeated": 0.3}, band_of=band_of)
    policy = steps(60, 65, metrics={"entropy_repeated": 0.4}, band_of=band_of)
    begun = [
        step for step, rule, state in said([*steps(5), *own, *policy]) if (rule, state) == ("out_of_band", "begin")
    ]
    assert begun == ([5 + 1 + 19] if band_of == "step" else [65 + 1 + 19])


def test_the_way_into_the_band_is_not_blamed():
    assert said(steps(400, entropy=0.5)) == []
    assert said(steps(520, entropy=0.5)) == [(499, "out_of_band", "begin")], "but after 500 steps it is"


def test_collapse_says_more_than_out_of_band():
    falling = steps(100, 60, entropy=lambda i: 0.3 * math.exp(-0.01 * i))
    found = said([*steps(60), *falling])
    assert [(rule, state) for _, rule, state in found] == [("entropy_collapse", "begin")]
    assert 60 + math.log(0.3 / 0.27) / 0.01 < found[0][0] < 60 + 30


def test_collapse_hands_over_to_out_of_band_where_the_fall_ends():
    falling = steps(100, 60, entropy=lambda i: max(0.15, 0.3 * math.exp(-0.01 * i)))
    level = steps(120, 160, entropy=lambda i: 0.15 * math.exp(0.0004 * i))
    found = [(rule, state) for _, rule, state in said([*steps(60), *falling, *level])]
    assert found == [("entropy_collapse", "begin"), ("entropy_collapse", "end"), ("out_of_band", "begin")]


@pytest.mark.parametrize(
    ("rule", "reason", "state", "begins", "ends"),
    [
        ("not_reachable", "target not reachable: held at H=0.4", "saturated", 10, 20),
        ("saturated", "H=0.3 in band", "saturated", 20, 20),
        ("wrong_sign", "H moved away: acts with the wrong sign", "tracking", 1, 30),
        ("exploding", "entropy explodes", "exploding", 1, 10),
        ("no_positives", "no positives for 3 steps", "holding", 5, 5),
    ],
)
def test_what_the_controller_says(rule, reason, state, begins, ends):
    events = [*steps(5), *steps(40, 5, state=state, reason=reason), *steps(40, 45)]
    assert said(events) == [(5 + begins - 1, rule, "begin"), (45 + ends - 1, rule, "end")]


def test_saturated_on_the_way_to_the_target_is_no_alarm():
    reason = "at its limit, H=0.4 on its way to 0.3"
    assert said(steps(60, state="saturated", reason=reason)) == []


def test_explosion_without_control():
    events = [*steps(10), *steps(10, 10, entropy=0.67), *steps(30, 20, entropy=0.4)]
    assert said(events)[:2] == [(12, "entropy_explosion", "begin"), (29, "entropy_explosion", "end")]


def test_explosion_before_the_band_is_reached():
    falling = [one for k in range(40) for one in steps(1, k, entropy=0.6 - 0.001 * k)]
    assert said(falling) == []
    rising = [one for k in range(40) for one in steps(1, k, entropy=0.6 * 1.05**k)]
    assert said(rising) == [(21, "entropy_runaway", "begin")]  # twice the first mean from step 19 on
    far_above = [one for k in range(40) for one in steps(1, k, entropy=5.0 * 1.01**k)]  # as a large model starts
    assert said(far_above) == []


def test_oscillation_is_swings_over_the_whole_band():
    square = steps(200, 10, entropy=lambda i: 0.45 if i % 40 < 20 else 0.18)
    found = [(rule, state) for _, rule, state in said([*steps(10), *square, *steps(120, 210)])]
    assert ("oscillation", "begin") in found
    assert ("oscillation", "end") in found
    small = steps(200, 10, entropy=lambda i: 0.36 if i % 20 < 10 else 0.28)
    assert ("oscillation", "begin") not in [(rule, state) for _, rule, state in said([*steps(10), *small])]


def test_no_signal():
    events = [*steps(10), *steps(20, 10, all_equal_groups=1.0), *steps(20, 30)]
    # mean of ten above .95 with one 0.3 among them is .93: ten in a row; back below .9 with two 0.3
    assert said(events) == [(19, "no_signal", "begin"), (31, "no_signal", "end")]


@pytest.mark.parametrize(("term", "alerts"), [(1.0, [(48, "begin"), (96, "end")]), (0.1, []), (0.0, [])])
def test_few_positives_matter_where_the_term_is_their_mean(term, alerts):
    """0.1: the mean is over all answers; 0: there is no such term."""
    metrics = {"mismatch_kl": 5e-4, "positive_term": term}
    events = [
        *steps(40, metrics=metrics),
        *steps(40, 40, metrics=metrics, positives=3),
        *steps(40, 80, metrics=metrics, positives=9),
    ]
    # below 6 with the 9th 3 among twenty; above 8 with the 17th 9
    assert said(events) == [(step, "few_positives", state) for step, state in alerts]


def test_unjudged():
    events = [*steps(10, unjudged=0.05), *steps(3, 10, unjudged=0.06), *steps(20, 13, unjudged=0.0)]
    assert said(events) == [(10, "unjudged", "begin"), (22, "unjudged", "end")]


def test_reward_drop_is_against_the_best_so_far():
    events = [*steps(40), *steps(60, 40, reward=0.3), *steps(60, 100, reward=0.5)]
    # mean of 20 falls by .01 a step, two standard errors are at most .046: both below .375 with the 17th, three in a
    # row; above .425 with the 9th, five in a row
    assert said(events) == [(58, "reward_drop", "begin"), (112, "reward_drop", "end")]
    assert said([*steps(40, reward=0.5), *steps(60, 40, reward=0.4)]) == []


@pytest.mark.parametrize("broken", [{"loss": None}, {"grad_norm": math.nan}, {"entropy": None}, {"loss": math.inf}])
def test_not_finite(broken):
    events = [*steps(10), a.step(10, **broken), *steps(20, 11)]
    assert said(events) == [(10, "not_finite", "begin"), (20, "not_finite", "end")]
    made = AlertEngine(RULES)
    text = next(alert.reason for e in events for alert in made.observe(e))
    assert f"{'gradient norm' if 'grad_norm' in broken else next(iter(broken))} not finite" in text


def test_mismatch_growing_speaks_of_growth_above_rounding():
    def metrics(level):
        return lambda i: {"mismatch_kl": level * (1 + min(i, 60) / 10)}

    rules = [
        rule for _, rule, _ in said([*steps(30, metrics={"mismatch_kl": 1e-3}), *steps(60, 30, metrics=metrics(1e-3))])
    ]
    assert rules == ["mismatch_growing"]
    assert said([*steps(30, metrics={"mismatch_kl": 1e-9}), *steps(60, 30, metrics=metrics(1e-9))]) == []


def test_experts_unbalanced_speaks_of_a_router_that_collapses():
    def load(level, growth=1.0):
        return lambda i: {"router_load_max": level * (1 + growth * max(0, min(i - 30, 60)) / 30), "mismatch_kl": 5e-4}

    assert [rule for _, rule, _ in said(steps(90, metrics=load(2.0)))] == ["experts_unbalanced"]
    assert said(steps(90, metrics=load(0.9))) == []  # 2.7 times the mean is no collapse
    assert said(steps(90, metrics=load(5.0, growth=0.0))) == []  # nor is what was so from the beginning


def test_engines_and_faults():
    lost = [*steps(5), a.step(5, engines={"alive": 1, "total": 2}), *steps(5, 6)]
    assert said(lost) == [(5, "engine_lost", "begin"), (6, "engine_lost", "end")]
    for what in ("engine 1 was started again", "3 samples are left out: 3 with a token id beyond the vocabulary"):
        mended = {"kind": "fault", "time": a.START + 51, "description": what}
        assert said([*steps(5), mended, *steps(30, 5)]) == [(5, "fault", "begin"), (24, "fault", "end")]


def test_stall_lasts_until_the_next_step():
    stalled = a.event("stall", 5, seconds=700, factor=20, stacks=[], action="report")
    assert said([*steps(5), stalled, *steps(3, 5)]) == [(5, "stall", "begin"), (5, "stall", "end")]


def test_checkpoint_overdue_by_an_interval():
    """A checkpoint may be complete as late as the next is due: the run waits for it there."""

    def saved(at):
        return a.event("checkpoint", at, path="x")

    on_time = [*steps(20), saved(10), *steps(10, 20), saved(20)]
    late = [*steps(11, 30), saved(30)]
    assert said([*on_time, *late], engine()) == [(40, "checkpoint_overdue", "begin"), (40, "checkpoint_overdue", "end")]
    assert said(steps(100), AlertEngine(RULES)) == [], "checkpoint.every=0: asked for at the end alone"


def ticks(made, seconds, every=60, free=None):
    """What time alone brings, from the end of step 4 on: (seconds, rule, state)."""
    for e in steps(5):
        made.observe(e)
    start = a.START + 5 * a.STEP
    times = range(every, seconds + 1, every)
    return [(t, x.rule, x.state) for t in times for x in made.tick(start + t, free(t) if free else None)]


def test_slow_step_is_four_steps_and_two_minutes():
    made = engine()
    assert ticks(made, 600) == [(180, "slow_step", "begin")]  # 4 steps are 40 s, so the two minutes decide
    assert [(x.step, x.rule, x.state) for x in made.observe(a.step(5))] == [(5, "slow_step", "end")]


def test_slow_step_allows_for_an_evaluation_as_long_as_the_last_ones():
    """Which took 300 s: another may be under way, and one that is 4 steps late by then is told."""
    made = engine()
    a.run(made, steps(5))
    after = a.START + 50 + 300
    evaluation = {"kind": "evaluation", "step": 5, "time": after, "pass_at_k": {}, "maj_at_k": {}}
    assert a.run(made, [evaluation, *(a.step(5 + i, after + 10 * (i + 1)) for i in range(3))]) == []
    last = after + 30
    assert [(t, x.rule) for t in range(0, 600, 10) for x in made.tick(last + t)] == [(350, "slow_step")]


def test_unsaved_work_is_of_four_hours():
    found = ticks(engine(), 15000)
    assert [(rule, state) for _, rule, state in found] == [("slow_step", "begin"), ("unsaved_work", "begin")]
    assert found[1][0] == 14400  # since the start, 50 s earlier


def test_disk_filling_looks_six_hours_ahead():
    def quiet(free):
        return [(t, rule, state) for t, rule, state in ticks(engine(), 7200, free=free) if rule == "disk_filling"]

    # 100 GiB, 10 GiB an hour: below 6 hours once less than 60 are left, after 4 hours; here 70 GiB, so after one
    found = quiet(lambda t: int((70 - 10 * t / 3600) * a.GIB))
    assert [(rule, state) for _, rule, state in found] == [("disk_filling", "begin")]
    assert abs(found[0][0] - 3600) <= 60
    assert quiet(lambda t: int((70 - 60 * (1800 < t < 2400)) * a.GIB)) == [], "a checkpoint that comes and goes"
    assert quiet(lambda t: 70 * a.GIB) == []
    assert quiet(lambda t: int((70 + t / 60) * a.GIB)) == []


def test_the_alert_of_a_disk_ends_once_it_fills_no_more():
    def free(t):
        return int((50 - 10 * min(t, 3600) / 3600) * a.GIB)

    found = [(t, state) for t, rule, state in ticks(engine(), 14400, free=free) if rule == "disk_filling"]
    assert [state for _, state in found] == ["begin", "end"]
    assert found[0][0] == 600  # ten samples
    assert 3600 < found[1][0] < 7200
