"""The engine over a whole run: resumes, replays, time."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))
import alert_events as a

from pipeline.config.schema import AlertsConfig
from pipeline.monitoring.alerts.engine import AlertEngine, replayed
from pipeline.monitoring.alerts.replay import replay
from pipeline.monitoring.alerts.rules import load_rules
from pipeline.monitoring.events import EventLog, in_force

RULES = load_rules(AlertsConfig())


def engine(rules=RULES, **constants):
    return AlertEngine(rules, constants)


def full():
    return AlertEngine(RULES, {"checkpoint/every": 10.0})


def checkpoint(at):
    return a.event("checkpoint", at, path="x")


def resume(at, time=None):
    return {"kind": "resume", "step": at, "time": a.START + 1e5 if time is None else time}


def exploding(first, count):
    return [a.step(i, state="exploding", reason="entropy explodes") for i in range(first, first + count)]


def steps(first, count):
    return [a.step(i) for i in range(first, first + count)]


def test_an_alert_event_has_the_fields_that_readers_know():
    (alert,) = [x for e in [*steps(0, 1), *exploding(1, 1)] for x in engine().observe(e)]
    assert alert.to_dict() == {
        "rule": "exploding",
        "severity": "critical",
        "state": "begin",
        "step": 1,
        "time": a.START + 20,
        "reason": "entropy explodes. Remedy: stop and resume from the last checkpoint with a lower "
        "learner.optimizer.lr or a smaller entropy.command_max",
    }


def test_a_resume_forgets_an_alert_that_it_supersedes():
    made = engine()
    assert a.run(made, [*steps(0, 10), checkpoint(10), *exploding(10, 3)]) == [(10, "exploding", "begin")]
    assert a.run(made, [resume(10)]) == [], "the log leaves its beginning out, so there is nothing to end"
    assert a.run(made, [*steps(10, 20)]) == []
    assert made.active == {}


def test_a_resume_keeps_an_alert_that_was_raised_at_its_checkpoint():
    made = engine()
    before = [*steps(0, 5), *exploding(5, 5), checkpoint(10)]
    assert a.run(made, [*before, *steps(10, 12)]) == [(5, "exploding", "begin"), (19, "exploding", "end")]
    assert a.run(made, [resume(10)]) == []
    assert list(made.active) == ["exploding"], "its end was superseded"
    assert a.run(made, steps(10, 12)) == [(19, "exploding", "end")]


def test_a_resume_from_an_unknown_step_starts_afresh_and_ends_what_is_in_force():
    made = engine()
    a.run(made, [*steps(0, 5), *exploding(5, 5)])
    assert a.run(made, [resume(7)]) == [(6, "exploding", "end")]
    assert a.run(made, exploding(7, 1)) == [(7, "exploding", "begin")]


def test_a_resume_where_the_log_ends_goes_on_as_if_nothing_had_been():
    """The crash came between the checkpoint and its event."""
    made = engine()
    assert a.run(made, [*steps(0, 3), *exploding(3, 2), resume(5), *exploding(5, 2)]) == [(3, "exploding", "begin")]


def test_time_before_a_resume_is_not_counted():
    made = engine()
    a.run(made, steps(0, 5))
    end = a.START + 50
    assert [(x.step, x.rule) for x in made.tick(end + 1000)] == [(5, "slow_step")]
    made.observe(resume(5, end + 1e6))
    assert made.tick(end + 1e6 + 60) == []


def test_an_alert_of_time_is_ended_by_a_resume():
    rules = [rule for rule in RULES if rule.name == "unsaved_work"]
    made = engine(rules)
    a.run(made, steps(0, 5))
    assert [x.rule for x in made.tick(a.START + 20000)] == ["unsaved_work"]
    later = [{**e, "time": e["time"] + 20000} for e in steps(5, 5)]
    assert a.run(made, later) == []
    assert a.run(made, [resume(8)]) == [(7, "unsaved_work", "end")]


def test_a_resume_that_supersedes_the_end_of_an_alert_of_time_ends_it_again():
    """The disk fills at step 3; time ends that at step 4; the run resumes from a checkpoint at 4, so the log loses the
    end.
    """
    made = engine([rule for rule in RULES if rule.name == "disk_filling"])
    full_disk = [(a.START + 61 * i, free * a.GIB) for i, free in enumerate([999, 99, 99, *7 * [9]])]
    assert a.run(made, steps(0, 3)) == []
    assert [(x.step, x.state) for tick in full_disk for x in made.tick(*tick)] == [(3, "begin")]
    assert a.run(made, [*steps(3, 1), checkpoint(4), *steps(4, 1)]) == []
    assert [(x.step, x.state) for x in made.tick(a.START + 61 * 10, 9 * a.GIB)] == [(4, "end")]
    assert a.run(made, [resume(4)]) == [(3, "disk_filling", "end")]
    assert made.active == {}


def test_a_silenced_rule_speaks_when_the_one_that_silences_it_ends():
    made = engine([rule for rule in RULES if rule.name in ("out_of_band", "not_reachable")])
    said = "target not reachable: held at H=0.5"
    far = [a.step(i, entropy=0.5, state="saturated", reason=said) for i in range(10, 60)]
    still = [a.step(i, entropy=0.5) for i in range(60, 100)]
    found = a.run(made, [*steps(0, 10), *far, *still])
    assert found == [(19, "not_reachable", "begin"), (79, "not_reachable", "end"), (79, "out_of_band", "begin")]


def test_what_the_rules_never_saw_is_said():
    bare = [a.step(i, metrics={}, engines={}) for i in range(3)]
    assert sorted(replay(bare, RULES, {}).blind) == [
        "disk_filling: no log holds disk/hours_left",
        "engine_lost: this run has no engines/alive",
        "experts_unbalanced: this run has no router/load_max",
        "mismatch_growing: this run has no mismatch/kl",
    ]


def test_a_replay_shows_what_is_in_force_and_looks_at_the_time_between_events():
    late = [{**e, "time": e["time"] + 600} for e in steps(10, 5)]
    again = [{**e, "time": e["time"] + 5000} for e in steps(10, 5)]
    events = [*steps(0, 10), checkpoint(10), *late, *exploding(15, 2), resume(10, a.START + 5000), *again]
    assert replay(events, RULES, {}).firings == []
    (slow, broken) = replay(events[:-6], RULES, {}).firings
    assert (slow.begin.rule, slow.begin.step, slow.end.step) == ("slow_step", 10, 10)
    assert (broken.begin.rule, broken.end) == ("exploding", None)
    assert broken.to_dict()["end_step"] is None


def state(made):
    """Everything that later answers depend on."""
    return repr((sorted(made.active.items()), made._memory.step, made._memory.saved, made._memory.entered)) + repr(
        [vars(c) for w in made._watches() for c in (w._when, w._guard) if c is not None]
        + [(w._in_a_row, w._over) for w in made._watches()]
    ).replace("nan", "-")


@pytest.mark.parametrize("later", [1, 5])
def test_a_checkpoint_that_is_complete_some_steps_later_is_of_the_step_where_it_was_begun(later):
    """The state that a resume takes alerts back to does not know of the steps between."""
    begun = {"kind": "snapshot", "step": 12, "time": a.START + 120}
    before, after = [*steps(0, 8), *exploding(8, 4), begun], exploding(12, 8)
    at_once, late = full(), full()
    a.run(at_once, [*before, checkpoint(12), *after])
    a.run(late, [*before, *after[:later], checkpoint(12), *after[later:]])
    for made in (at_once, late):
        made.observe(resume(12, a.START + 5000))
    again = exploding(12, 30)
    assert a.run(late, again) == a.run(at_once, again)
    assert state(late) == state(at_once)


@st.composite
def histories(draw, ticks=False):
    """A run that checkpoints every few steps, crashes and resumes, with steps of many kinds; with ``ticks`` also (time,
    bytes free).
    """
    kinds = {
        "calm": {},
        "far": {"entropy": 0.7},
        "low": {"entropy": 0.1},
        "broken": {"loss": None, "entropy": None},
        "exploding": {"state": "exploding", "reason": "entropy explodes"},
        "stuck": {"state": "saturated", "reason": "target not reachable"},
        "poor": {"reward": 0.0, "positives": 0, "state": "holding", "reason": "no positives for 2 steps"},
    }
    events, done, saved, time = [], 0, [0], a.START
    writing = None  # updates in the checkpoint in the making
    for _ in range(draw(st.integers(1, 8))):
        kind, count = draw(st.sampled_from(sorted(kinds))), draw(st.integers(1, 25))
        for _ in range(count):
            time += a.STEP
            events.append(a.step(done, time, **kinds[kind]))
            done += 1
        for free in draw(st.lists(st.sampled_from([9, 99, 999]), max_size=15 * ticks)):
            time += 61
            events.append((time, free * a.GIB))
        after = draw(st.sampled_from(["nothing", "snapshot", "checkpoint", "fault", "resume"]))
        time += 1
        if after in ("snapshot", "checkpoint") and writing is not None:
            events.append({"kind": "checkpoint", "step": writing, "time": time, "path": "x"})
            saved.append(writing)
            writing = None
        if after == "snapshot":
            events.append({"kind": "snapshot", "step": done, "time": time})
            writing = done
        elif after == "checkpoint":
            events.append({"kind": "checkpoint", "step": done, "time": time, "path": "x"})
            saved.append(done)
        elif after == "fault":
            events.append({"kind": "fault", "time": time, "description": "engine 0 was started again"})
        elif after == "resume":
            done, writing = saved[-1], None
            events.append({"kind": "resume", "step": done, "time": time})
    return events


def where(events):
    """Updates done at the end of a log, and the checkpoints there are to go back to."""
    done, saved = 0, [0]
    for e in events:
        if e["kind"] == "step":
            done = e["step"] + 1
        elif e["kind"] == "checkpoint":
            saved.append(e["step"])
        elif e["kind"] == "resume":
            done = e["step"]
    return done, [at for at in saved if at <= done]


@settings(max_examples=40, deadline=None)
@given(histories(), st.data())
def test_a_restart_at_any_event_changes_nothing(tmp_path_factory, events, data):
    """Live, the alerts go into the log; an engine that reads that log says from there on what the old one would have
    said.
    """
    cut = data.draw(st.integers(0, len(events)))
    live, path = full(), tmp_path_factory.mktemp("log") / "events.jsonl"
    with EventLog(path) as log:
        for e in events[:cut]:
            log.append(e["kind"], {name: value for name, value in e.items() if name != "kind"})
            for alert in live.observe(e):
                log.append("alert", alert.to_dict())
    done, saved = where(events[:cut])
    again = {"kind": "resume", "step": data.draw(st.sampled_from([done, *saved])), "time": a.START + 1e5}
    read = replayed(full(), path, again["step"])
    assert read.observe(again) == live.observe(again)
    assert state(read) == state(live)
    rest = [e for e in events[cut:] if e["kind"] != "resume"]
    assert a.run(read, rest) == a.run(live, rest)


@settings(max_examples=40, deadline=None)
@given(histories(ticks=True))
def test_what_the_log_says_to_be_in_force_is_what_the_engine_holds(events):
    """In the log beginnings and ends alternate, also after what resumes have superseded is left out."""
    made, log = full(), []
    for e in events:
        found = made.tick(*e) if isinstance(e, tuple) else made.observe(e)
        log += [] if isinstance(e, tuple) else [e]
        log += [{"kind": "alert", **alert.to_dict()} for alert in found]
    begun = set()
    for e in in_force(log):
        if e["kind"] == "alert":
            assert (e["rule"] in begun) == (e["state"] == "end")
            begun ^= {e["rule"]}
    assert begun == set(made.active)


def test_begin_and_end_alternate_whatever_comes(tmp_path):
    made, open_now = engine(), set()
    events = [*steps(0, 10), *exploding(10, 5), *steps(15, 30), checkpoint(45), *exploding(45, 3), *steps(48, 30)]
    for e in events:
        for alert in made.observe(e):
            assert (alert.rule in open_now) == (alert.state == "end")
            open_now ^= {alert.rule}
    assert open_now == set()


def test_memory_does_not_grow():
    made = engine()
    sizes = []
    for block in range(4):
        for i in range(300):
            at = 300 * block + i
            made.observe(a.step(at))
            if (at + 1) % 10 == 0:
                made.observe(checkpoint(at + 1))
        sizes.append(len(repr(state(made))) + sum(len(s.figures) for s in made._snapshots.values()))
    assert max(sizes[1:]) - min(sizes[1:]) < 500
    assert len(made._snapshots) == 8


def logged(path, events):
    with EventLog(path) as log:
        for e in events:
            log.append(e["kind"], {name: value for name, value in e.items() if name != "kind"})
    return path


def test_rules_that_changed_since_take_over_what_the_log_says(tmp_path):
    """What a new rule finds is told; what a rule that is gone began is ended; what only time began goes on."""

    def begun(rule, state="begin"):
        return {"kind": "alert", "time": a.START, "step": 3, "rule": rule, "severity": "info"} | {
            "state": state,
            "reason": "because",
        }

    told = [begun("gone"), begun("over"), begun("over", "end"), begun("unsaved_work")]
    path = logged(tmp_path / "events.jsonl", [*exploding(0, 12), *told])
    made = replayed(engine(), path, 12)
    assert list(made.active) == ["unsaved_work"], "nobody was told that it explodes"
    assert sorted(a.run(made, [resume(12)])) == [(11, "gone", "end"), (11, "unsaved_work", "end")]
    assert a.run(made, exploding(12, 1)) == [(12, "exploding", "begin")]


@pytest.mark.parametrize("order", [1, -1])
def test_rules_are_independent_of_each_other_s_place(order):
    free = [rule for rule in RULES if not rule.config.unless][::order]
    events = [*steps(0, 10), *exploding(10, 5), *steps(15, 30)]
    assert sorted(a.run(AlertEngine(free), events)) == [(10, "exploding", "begin"), (24, "exploding", "end")]
