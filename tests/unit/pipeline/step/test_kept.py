"""Which rollouts a run keeps: the same ones whoever asks, known before the step."""

from dataclasses import replace

from pipeline.monitoring.samples import described
from pipeline.step.kept import choose as choose_of
from pipeline.step.kept import measure
from pipeline.types import Role, StepSamples
from tests.unit.pipeline.monitoring import run_writer as runs


def groups(count, role=Role.MAIN):
    """Each of two samples, whose seeds tell group and place: 10, 11, 20, 21, ..."""
    return [
        runs.group(*(replace(runs.sample(role=role), seed=10 * g + i) for i in range(2)), role=role)
        for g in range(1, count + 1)
    ]


def choose(main, auxiliary, count, step):
    return choose_of(StepSamples(main, auxiliary, 0), count, step)


def seeds(chosen):
    return [(str(sample.role), sample.seed) for _, sample in chosen]


def test_chosen_are_spread_over_main_and_auxiliary_groups_and_change_from_step_to_step():
    main, auxiliary = groups(6), groups(1, Role.AUXILIARY)
    assert seeds(choose(main, auxiliary, 3, step=4)) == [("main", 10), ("main", 40), ("auxiliary", 10)]
    assert seeds(choose(main, auxiliary, 3, step=5)) == [("main", 11), ("main", 41), ("auxiliary", 11)]
    assert seeds(choose(main, [], 100, step=0)) == [("main", 10 * g) for g in range(1, 7)]
    assert seeds(choose(main, auxiliary, 1, step=0)) == [("main", 10)]


def test_what_has_no_token_is_not_chosen():
    empty = runs.group(runs.sample(tokens=0, finish="abort"), runs.sample())
    assert seeds(choose([empty, *groups(1), runs.group()], [], 4, step=0)) == [("main", 10)]
    assert choose([empty], [], 4, step=0) == []


def test_the_learner_is_not_asked_about_nothing_nor_in_nine_steps_of_ten():
    assert measure([], learner=None, step=0) == []
    (kept,) = measure(choose(groups(1), [], 1, step=3), learner=None, step=13)
    assert (kept.sample.seed, kept.entropies) == (11, None)
    assert "entropies" not in described(kept, 13, tokenizer=None)
