"""Steps that are drawn ahead, on simulated engines whose answers have heavy tails."""

import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clock import StepClock
from pipeline.config.load import load_config
from pipeline.data.cursor import DataCursor
from pipeline.rollout.engine import EngineError
from pipeline.rollout.holding import ClosedError
from pipeline.rollout.parts import joined, remainder
from pipeline.step.queue import RolloutQueue
from pipeline.step.waiting import drawn_of, plain_of
from pipeline.types import ControlDecision, Prompt, Role, Sample, SampleGroup, WeightSpan
from tests.unit.pipeline.step.test_draw import ROOT

DECISION = ControlDecision(1.0, 1.0, 0, "off", "")
LONGEST = 4000  # tokens
PROMPTS = [Prompt(str(i), (1, 2), "", None, "exact") for i in range(64)]


def length_of(seed):
    """Pareto of shape 1.2: the longest of thousands is hundreds of times the median."""
    return min(LONGEST, int(4 * np.random.default_rng(seed).random() ** (-1 / 1.2)))


@dataclass
class Simulated:
    """Answers with the weights in force; short groups come first. A token takes ``token_s``."""

    token_s: float = 0.0
    version: int = 0
    fails: bool = False
    asked: list = field(default_factory=list)  # version and number of groups of every call
    aborted: threading.Event = field(default_factory=threading.Event)

    def stream(self, requests):
        self.asked.append((self.version, len(requests)))
        if self.fails:
            raise EngineError("its process died")
        groups = [(i, self.group(request)) for i, request in enumerate(requests)]
        waited = 0
        for i, group in sorted(groups, key=lambda pair: max(len(s.token_ids) for s in pair[1].samples)):
            longest = max(len(sample.token_ids) for sample in group.samples)
            self.aborted.wait((longest - waited) * self.token_s)
            waited = longest
            yield [(i, group)]

    def group(self, request):
        samples = [
            Sample(np.zeros(n, np.int64), np.zeros(n, np.float32), 1.0, seed, Role.MAIN, "stop", (self.span(n),))
            for seed, n in ((seed, length_of(seed)) for seed in request.seeds)
        ]
        return SampleGroup(request.prompt, tuple(samples), request.role)

    def span(self, count):
        return WeightSpan(self.version, 0, count)

    def abort(self):
        self.aborted.set()


@dataclass
class Interrupted(Simulated):
    """Answers that are held: by ``abort`` as far as they came, a token every ``token_s``, or at ``pause_at``.

    ``lingers``: of those begun after an update the longest is drawn until it is held once, however busy the machine is.
    """

    lingers: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    aborts: int = 0

    def stream(self, requests):
        asked, before, began = [remainder(request) for request in requests], self.aborts, time.monotonic()
        left = {
            i: [self.rest(request, place) for place in range(len(request.seeds))] for i, request in enumerate(asked)
        }
        last = max(left, key=lambda i: max(left[i]))
        for i, longest in sorted(((i, max(parts)) for i, parts in left.items()), key=lambda pair: pair[1]):
            lingers = self.lingers and self.version > 0 and i == last and not requests[i].begun
            with self.changed:
                until = began + longest * self.token_s - time.monotonic()
                self.changed.wait_for(lambda: self.aborts != before, 60 if lingers else max(0.0, until))
            drawn = longest
            if self.aborts != before and (lingers or time.monotonic() < began + longest * self.token_s):
                drawn = min(longest - 1, int((time.monotonic() - began) / self.token_s))
            yield [(i, joined(requests[i], self.part(asked[i], drawn)))]

    def rest(self, request, place):
        begun = len(request.begun[place].token_ids) if request.begun else 0
        return min(length_of(request.seeds[place]), request.max_new_tokens) - begun

    def part(self, request, drawn):
        """As far as a response comes in so many tokens."""
        samples = []
        for place, seed in enumerate(request.seeds):
            rest = self.rest(request, place)
            count = min(rest, drawn)
            ends = length_of(seed) <= request.max_new_tokens
            reason = "abort" if count < rest else "stop" if ends else "length"
            values = np.zeros(count, np.int64), np.zeros(count, np.float32), 1.0, seed, Role.MAIN, reason
            samples.append(Sample(*values, (WeightSpan(self.version, 0, count),)))
        return SampleGroup(request.prompt, tuple(samples), request.role)

    def abort(self):
        with self.changed:
            self.aborts += 1
            self.changed.notify_all()


class Judge:
    def verify(self, groups, *, more=False):
        return [replace(g, samples=tuple(replace(s, reward=float(s.seed % 2)) for s in g.samples)) for g in groups]


def queue(engine, staleness, *words, longest=LONGEST):
    small = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "entropy.controller=none", *words]
    config = load_config(ROOT / "configs/recipe/pm4.yaml", [*small, f"rollout.staleness={staleness}"])
    config = replace(config, rollout=replace(config.rollout, max_new_tokens=longest))  # no model limits it here
    return RolloutQueue(config, DataCursor(PROMPTS, seed=0), engine, Judge())


PARTIAL = "rollout.partial=true"


def seeds_of(found):
    return [[s.seed for g in samples.main for s in g.samples] for samples, _ in found]


def trained(engine, staleness, steps, *words, longest=LONGEST):
    """What every step trains on: (samples, their ages)."""
    drawing, found = queue(engine, staleness, f"steps={steps}", *words, longest=longest), []
    for step in range(steps):
        drawn = drawing.next(step, DECISION, StepClock())
        found.append((drawn.samples, drawn.samples.ages(step)))
        drawing.settle()
        engine.version = step + 1
    drawing.close()
    return found


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_the_lengths_trained_on_are_those_drawn(staleness):
    """Kolmogorov-Smirnov over 9,600 answers: what is dropped or put off for its length would show. What is drawn but
    not trained on are the answers of no step; and prompt and seed go to the step that they go to without staleness.
    """
    steps = 300
    found = trained(Simulated(), staleness, steps)
    lengths = np.array([len(s.token_ids) for samples, _ in found for g in samples.main for s in g.samples])
    drawn = np.array([length_of(10**9 + i) for i in range(len(lengths))])
    assert len(lengths) == steps * 8 * 4
    assert lengths.max() > 100 * np.median(lengths)
    grid = np.unique(np.concatenate([lengths, drawn]))
    shares = [np.searchsorted(np.sort(each), grid, "right") / len(each) for each in (lengths, drawn)]
    assert abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / len(lengths))  # p = 0.001
    seeds = [[s.seed for g in samples.main for s in g.samples] for samples, _ in found]
    fresh = trained(Simulated(), 0, 20)
    assert seeds[:20] == [[s.seed for g in samples.main for s in g.samples] for samples, _ in fresh]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(1, 12))
def test_no_group_starts_before_it_may_and_every_one_is_trained_on_once(staleness, steps):
    engine = Simulated()
    found = trained(engine, staleness, steps)
    begun = 0
    for version, groups in engine.asked:
        begun += groups
        assert begun <= (staleness + version + 1) * 8
    assert begun == steps * 8, "nothing is drawn that no step trains on"
    assert [ages["max"] for _, ages in found] == [min(step, staleness) for step in range(steps)]
    seeds = [s.seed for samples, _ in found for g in samples.main for s in g.samples]
    assert len(seeds) == len(set(seeds)) == steps * 8 * 4


def test_the_controller_is_told_the_age_as_measured():
    """Not the bound: the first steps train on fresher samples, and half of every answer is of the weights after."""

    class Renewed(Simulated):
        def group(self, request):
            group = super().group(request)
            halves = [(self.span(n // 2), WeightSpan(self.version + 1, n // 2, n)) for n in map(len_of, group.samples)]
            samples = zip(group.samples, halves, strict=True)
            return replace(group, samples=tuple(replace(sample, weight_versions=spans) for sample, spans in samples))

    def len_of(sample):
        return len(sample.token_ids)

    for engine, fresher in ((Simulated(), 0.0), (Renewed(), 0.5)):
        drawing, told = queue(engine, 4, "steps=8"), []
        for step in range(8):
            drawn = drawing.next(step, DECISION, StepClock())
            told.append(drawing.batch(drawn, step).staleness)
            drawing.settle()
            engine.version = step + 1
        drawing.close()
        assert told[1:] == pytest.approx([min(step, 4) - fresher for step in range(1, 8)], abs=0.04)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("actuator", ["resample", "reweight"])
def test_samples_are_trained_under_the_command_that_drew_them(actuator, staleness):
    """A second rollout was drawn at a temperature of its time; where nothing was, the newest command holds."""

    class AsAsked(Simulated):
        def group(self, request):
            whole = super().group(request)
            return replace(whole, samples=tuple(replace(s, temperature=request.temperature) for s in whole.samples))

    commands = [round(1.1 + 0.1 * step, 1) for step in range(6)]
    words = ["entropy.controller=pi", f"entropy.actuator={actuator}"]
    engine = AsAsked()
    drawing = queue(engine, staleness, "steps=6", *words, "entropy.auxiliary_prompts=2")
    again = 2 if actuator == "resample" else 0
    for step, command in enumerate(commands):
        drawn = drawing.next(step, ControlDecision(command, command, again, "tracking", ""), StepClock())
        drawing.settle()
        engine.version = step + 1
        then = commands[max(0, step - staleness)] if actuator == "resample" else command
        assert drawn.decision.command == then
        asked = {sample.temperature for group in drawn.samples.auxiliary for sample in group.samples}
        assert asked == ({then} if actuator == "resample" else set())
    drawing.close()


def test_drawing_and_training_take_place_at_once():
    """The next step is drawn while this one trains; in turns nobody draws before it is asked for."""

    def begins_unasked(staleness, within_s):
        engine, begun, second = Simulated(token_s=0.0), [], threading.Event()
        draw = engine.stream

        def stream(requests):
            begun.append(requests)
            if len(begun) == 2:
                second.set()
            yield from draw(requests)

        engine.stream = stream
        drawing = queue(engine, staleness, "steps=2")
        drawing.next(0, DECISION, StepClock())
        begins = second.wait(within_s)
        drawing.close()
        return begins

    assert begins_unasked(1, 60)
    assert not begins_unasked(0, 0.3)


def test_what_fails_while_the_learner_trains_is_raised():
    engine = Simulated(fails=True)
    drawing = queue(engine, 1)
    with pytest.raises(EngineError, match="its process died"):
        drawing.next(0, DECISION, StepClock())
    drawing.close()


def test_closing_ends_what_is_being_drawn():
    engine = Simulated(token_s=1.0)
    drawing = queue(engine, 2)
    drawing._waiting.append(drawing._begin(0, 0, DECISION, StepClock()))
    began = time.monotonic()
    drawing.close()
    drawing.close()
    assert engine.aborted.is_set()
    assert time.monotonic() - began < 10


HELD = pytest.mark.parametrize("more", [(), ("rollout.deterministic=true",)], ids=["by the clock", "by count"])


@HELD
def test_a_run_that_ends_between_two_steps_asks_nothing_more(more):
    """Engines are paused then: threads that hold answers end, and a checkpoint would find the answers as they were."""
    engine = Interrupted(token_s=0.0)
    drawing = queue(engine, 1, PARTIAL, *more, "steps=9", longest=60)
    drawing.next(0, DECISION, StepClock())
    drawing.settle()
    engine.token_s = 0.005 if more else 1.0  # by the clock none may end before it is held, however busy the machine is
    drawing.next(1, DECISION, StepClock())
    drawing.settle()
    held, engine.stream = drawing.held, None  # to ask would raise a TypeError
    ending = threading.Thread(target=drawing.close, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    assert drawing.held == held > 0
    ends = {type(each.future.exception(20)) for each in drawing._waiting}
    assert ends - {type(None)} == {ClosedError}


@HELD
@pytest.mark.parametrize("staleness", [1, 4])
def test_held_answers_go_on_and_every_one_is_trained_on_once(staleness, more):
    """The same prompts and seeds as without: weights alone change."""
    steps = 12
    found = trained(Interrupted(token_s=1e-3, lingers=not more), staleness, steps, PARTIAL, *more, longest=60)
    assert seeds_of(found) == seeds_of(trained(Simulated(), 0, steps))
    versions = 0
    for step, (samples, ages) in enumerate(found):
        assert ages["max"] <= min(step, staleness)
        for sample in (s for g in samples.main for s in g.samples):
            spans = sample.weight_versions
            assert len(sample.token_ids) == min(60, length_of(sample.seed)), "not a token is lost or drawn twice"
            assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
            assert spans[-1].end == len(sample.token_ids)
            assert [span.version for span in spans] == sorted({span.version for span in spans})
            versions = max(versions, len(spans))
    assert versions > 1


def test_new_weights_wait_for_no_answer():
    """Without holding, an update waits for the longest."""

    def settled(token_s, *words):
        engine = Interrupted(token_s=0.0)
        drawing = queue(engine, 1, *words, "steps=9")
        drawing.next(0, DECISION, StepClock())
        drawing.settle()
        engine.token_s = token_s
        drawing.next(1, DECISION, StepClock())
        began = time.monotonic()
        drawing.settle()
        seconds, held, drawn = time.monotonic() - began, drawing.held, drawing._waiting[-1].future.done()
        drawing.close()
        return seconds, held, drawn

    _, none, drawn = settled(1e-3)
    assert (none, drawn) == (0, True)
    seconds, held, _ = settled(10.0, PARTIAL)  # the shortest answer takes longer than this may
    assert held > 0
    assert seconds < 30


def versions_of(found):
    return [[s.weight_versions for g in samples.main for s in g.samples] for samples, _ in found]


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_what_is_held_survives_a_checkpoint(staleness, killed_after, by_count):
    """Another queue goes on from what the first one held: each answer is trained on once.

    By count, the same weights draw every token.
    """
    words = (PARTIAL, "steps=8", *(["rollout.deterministic=true"] if by_count else []))
    first, found = queue(Interrupted(token_s=1e-4), staleness, *words, longest=60), []
    engine = first._holding._source
    for step in range(killed_after):
        samples = first.next(step, DECISION, StepClock()).samples
        found.append((samples, {}))
        first.settle()
        engine.version = step + 1
    fields, arrays = plain_of(drawn_of(*first.state_dict()))
    held = [s for each in first._waiting for r in each.drawing.left.values() for s in r.begun]
    cursor = first._sampler.cursor.state_dict()
    first.close()
    second = queue(Interrupted(token_s=1e-4, version=killed_after), staleness, *words, longest=60)
    second._sampler.cursor.load_state_dict(cursor)
    second.load_state_dict(fields, arrays)
    for step in range(killed_after, 8):
        found.append((second.next(step, DECISION, StepClock()).samples, {}))
        second.settle()
        second._holding._source.version = step + 1
    second.close()
    assert seeds_of(found) == seeds_of(trained(Simulated(), 0, 8))
    whole = {s.seed: s for samples, _ in found for g in samples.main for s in g.samples}
    for part in held:
        if len(part.token_ids):
            (*earlier, last), final = part.weight_versions, whole[part.seed].weight_versions
            assert final[: len(earlier)] == tuple(earlier), "what had been drawn is not drawn again"
            assert final[len(earlier)].version == last.version
    if by_count:
        at_once = trained(Interrupted(token_s=1e-4), staleness, 8, *words, longest=60)
        assert versions_of(found) == versions_of(at_once)


def test_a_further_round_begins_beside_the_answers_that_cannot_make_it_unnecessary():
    """Of 8 groups 7 come at once, and none of them teaches: whatever the last one does, more are needed."""
    second = threading.Event()
    rounds = []

    class Waiting(Simulated):
        def stream(self, requests):
            rounds.append(len(requests))
            if len(rounds) == 2:
                second.set()
            groups = [(i, self.group(request)) for i, request in enumerate(requests)]
            yield groups[:7]
            assert second.wait(20), "the second round waits for the first"
            yield groups[7:]

    engine = Waiting()
    drawing = queue(engine, 0, "rollout.sampling_rounds=2")
    drawing._sampler.verifier.verify = lambda groups, *, more=False: groups  # all rewards are 0
    samples = drawing.next(0, DECISION, StepClock()).samples
    assert rounds == [8, 8]
    assert [group.prompt.id for group in samples.main] == [p.id for p in DataCursor(PROMPTS, seed=0).take(16)]
    drawing.close()
