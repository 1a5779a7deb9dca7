"""What a step draws, with the shipped model in the native engine."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.clock import StepClock
from pipeline.config.load import load_config
from pipeline.data.cursor import DataCursor
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.holding import Holding
from pipeline.rollout.native.engine import NativeEngine
from pipeline.step.draw import Drawing, Sampler, to_train_on
from pipeline.step.requests import repeated_requests, step_requests
from pipeline.types import ControlDecision, Cuts, Role

ROOT = Path(__file__).resolve().parents[4]
MODEL = ROOT / "configs/model/pm4-100k"
DECISION = ControlDecision(1.3, 1.3, 2, "tracking", "")
SMALL = ["runtime=inline", "learner.tensor_model_parallel_size=1", "rollout.prompts_per_step=4"]


def configured(*overrides):
    return load_config(ROOT / "configs/recipe/pm4.yaml", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def parts():
    config = configured()
    tokenizer = load_tokenizer(MODEL)
    engine = NativeEngine()
    engine.start(MODEL)
    prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
    return engine, VerifierStage(config.data, tokenizer), prompts.train


def draw(parts, *overrides, prompts=None, step=0, again=()):
    engine, verifier, train = parts
    cursor = DataCursor(train if prompts is None else prompts, seed=0)
    clock, config = StepClock(), configured(*overrides)
    sampler = Sampler(cursor, Holding(engine), verifier, config, repeated_requests(again, config))
    drawing = Drawing(step, 0, DECISION)
    sampler.draw(drawing, clock)
    drawn = drawing.drawn().samples
    return drawn, to_train_on(drawn.main, config), clock.seconds()


def differs(group):
    return len({sample.reward for sample in group.samples}) > 1


def test_one_round_takes_what_comes(parts):
    drawn, trained, seconds = draw(parts, "rollout.samples_per_prompt=2")
    assert trained is drawn.main
    assert [len(group.samples) for group in drawn.main] == [2] * 4
    assert [group.role for group in drawn.auxiliary] == [Role.AUXILIARY] * 2
    assert drawn.stale == 0
    assert {"sample", "verify"} <= seconds.keys()


def test_dynamic_sampling_draws_until_enough_groups_differ(parts):
    """Of two samples a group seldom differs: several rounds, each with new prompts, auxiliary samples in the first
    only.
    """
    once, *_ = draw(parts, "rollout.samples_per_prompt=2")
    drawn, trained, _ = draw(parts, "rollout.samples_per_prompt=2", "rollout.sampling_rounds=20")
    assert sum(map(differs, once.main)) < 4
    assert [differs(group) for group in trained] == [True] * 4
    assert len(drawn.main) % 4 == 0
    assert sum(map(differs, drawn.main[:-4])) < 4  # it stopped as soon as it could
    assert trained == [group for group in drawn.main if differs(group)][:4]
    assert len({group.prompt.id for group in drawn.main}) == len(drawn.main)
    first = [[sample.text for sample in group.samples] for group in drawn.main[:4]]
    assert first == [[sample.text for sample in group.samples] for group in once.main]
    assert len(drawn.auxiliary) == 2


def test_dynamic_sampling_makes_do_with_too_few(parts):
    easy = [group.prompt for group in draw(parts, "rollout.samples_per_prompt=2")[0].main]
    drawn, trained, _ = draw(parts, "rollout.samples_per_prompt=2", "rollout.sampling_rounds=3", prompts=easy)
    assert len(drawn.main) == 4  # none is drawn twice, however often the epoch begins again
    kinds = [differs(group) for group in trained]
    assert len(kinds) == 4
    assert kinds == sorted(kinds, reverse=True)


def test_cuts_draws_the_second_part_of_each_group(parts):
    prompts = parts[2][1000:1002]
    plain, cut = (
        step_requests(prompts, DECISION, configured(*words), 0)
        for words in ([], ["rollout.cuts.share=0.5", "rollout.cuts.warmup_tokens=2"])
    )
    assert [request.cuts for request in cut] == [Cuts(8, 5, 0.03, 2)] * 2 + [None] * 2  # not the auxiliary ones
    assert [request.cuts for request in plain] == [None] * 4
    assert [request.seeds for request in cut] == [request.seeds for request in plain]
    for usual, other in zip(parts[0].generate(plain[:2]), parts[0].generate(cut[:2]), strict=True):
        same = [np.array_equal(a.token_ids, b.token_ids) for a, b in zip(usual.samples, other.samples, strict=True)]
        assert all(same[:8])
        assert not all(same[8:])
        for a, b in zip(usual.samples, other.samples, strict=True):
            assert a.token_ids[:2].tolist() == b.token_ids[:2].tolist()


def test_repeated_samples_are_the_same_at_every_step_and_change_no_other(parts):
    again, words = list(parts[2][2000:2003]), ["rollout.samples_per_prompt=2", "rollout.sampling_rounds=3"]
    (first, *_), (later, *_) = (draw(parts, *words, step=step, again=again) for step in (0, 7))
    plain, *_ = draw(parts, *words)
    assert [group.prompt for group in first.repeated] == again
    assert all(group.role is Role.REPEATED and len(group.samples) == 1 for group in first.repeated)
    assert not any(sample.text for group in first.repeated for sample in group.samples), "nobody judges them"
    tokens = [[sample.token_ids.tolist() for sample in group.samples] for group in (*first.repeated, *later.repeated)]
    assert tokens[:3] == tokens[3:]
    for one, two in ((first.main, plain.main), (first.auxiliary, plain.auxiliary)):
        texts = [[[sample.text for sample in group.samples] for group in groups] for groups in (one, two)]
        assert texts[0] == texts[1]
    assert [s.text for g in first.main for s in g.samples] != [s.text for g in later.main for s in g.samples]
