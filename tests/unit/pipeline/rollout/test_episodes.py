"""Episodes on the native engine: what is recorded is what was drawn, and nothing an environment does ends a run."""

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.load import PACKAGED
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.architecture import parse
from pipeline.rollout import episodes as module
from pipeline.rollout.engine import EngineError
from pipeline.rollout.environment import RewardError, reward_of
from pipeline.rollout.environments import tools
from pipeline.rollout.episodes import Episodes
from pipeline.rollout.native.decoder import Decoder
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.turns import Turns
from pipeline.types import Cuts, GenerateRequest, Prompt, Role, Sample, SampleGroup, WeightSpan
from tests.tiny_folder import hf_config, write_folder

FOLDER = PACKAGED / "model/pm4-100k"
SYMBOLS = "0123456789+-*=,$"


def config(**environment):
    run = RunConfig()
    run.rollout.max_prompt_tokens = run.rollout.max_new_tokens = 8
    settings = {"name": "tools", "max_turns": 3, "max_tokens": 40} | environment
    for name, value in settings.items():
        setattr(run.data.environment, name, value)
    return run


def prompt(problem="1234,10", name="p"):
    ids = tuple(SYMBOLS.index(letter) for letter in problem + "=")
    return Prompt(name, ids, problem + "=", problem, "countdown", {"operators": "+-"})


def requests(count=4, seeds=4, temperature=1.0, role=Role.MAIN):
    problems = ("1234,10", "1115,02", "5678,26", "2468,20")
    return [
        GenerateRequest(
            prompt(problems[i], f"p{i}"), tuple(range(10 * i + 1, 10 * i + 1 + seeds)), temperature, 8, role
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def engine():
    started = NativeEngine()
    started.start(FOLDER)
    return started


@pytest.fixture
def played(engine):
    """``Episodes`` over an environment, closed in the end."""
    opened = []

    def make(run, stream=engine.stream):
        opened.append(Episodes(run, load_tokenizer(FOLDER), stream))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def plain(groups):
    return [
        (s.token_ids.tolist(), s.log_probs.tolist(), s.drawn.tolist(), s.turns, s.stop_reason, s.reward)
        for group in groups
        for s in group.samples
    ]


def test_an_episode_is_what_the_engine_drew(played, engine):
    """Its log-probs are those of a forward pass over the whole conversation: nothing was tokenised anew."""
    groups = played(config()).generate(requests(temperature=1.3, role=Role.AUXILIARY))
    assert plain(groups) == plain(played(config()).generate(requests(temperature=1.3, role=Role.AUXILIARY)))
    samples = [(group.prompt, sample) for group in groups for sample in group.samples]
    assert {len(sample.turns) for _, sample in samples} >= {1, 3}
    reply = [SYMBOLS.index(letter) for letter in tools.REPLY]
    for asked, sample in samples:
        assert sample.temperature == 1.3
        assert (sample.stop_reason == "done") == sample.correct == (sample.reward == 1)
        for before, after in zip(sample.turns, sample.turns[1:], strict=False):
            assert sample.token_ids[before.end : after.start].tolist() == reply
        assert [bool(sample.drawn[i]) for t in sample.turns for i in range(t.start, t.end)] == [
            True
        ] * sample.drawn.sum()
        row = torch.tensor([[*asked.token_ids, *sample.token_ids.tolist()]])
        hidden = engine._decoder.prefill(row)[0]
        said = (engine._decoder.logits(hidden[:, :-1]) / 1.3).log_softmax(-1)
        exact = said.gather(-1, row[:, 1:, None])[0, len(asked.token_ids) - 1 :, 0].numpy()
        np.testing.assert_allclose(sample.of_drawn(sample.log_probs), sample.of_drawn(exact), atol=1e-4)
        assert not sample.log_probs[~sample.drawn].any()


def test_an_episode_carries_the_experts_that_read_each_of_its_tokens(played, tmp_path):
    """Those of one pass over the whole conversation: the weights are the same in every turn."""
    changes = {"vocab_size": 16, "num_experts": 8}
    folder, tensors = write_folder(tmp_path, "qwen3_moe", **changes)
    engine = NativeEngine(eos_token_ids=(15,), record_routes=True)
    engine.start(folder)
    decoder = Decoder(parse(hf_config("qwen3_moe", **changes)), tensors)
    groups = played(config(), engine.stream).generate(requests())
    samples = [
        (group.prompt, sample) for group in groups for sample in group.samples if sample.finish_reason != "abort"
    ]
    assert {len(sample.turns) for _, sample in samples} >= {3}
    for asked, sample in samples:
        routes: list[torch.Tensor] = []
        decoder.prefill(torch.tensor([[*asked.token_ids, *sample.token_ids.tolist()][:-1]]), routes)
        expected = torch.stack([layer[0] for layer in routes], dim=1).sort(-1).values
        assert np.array_equal(np.sort(sample.routes), expected)


def test_the_first_turn_is_the_single_answer_under_the_same_seed(played, engine):
    alone = engine.generate(requests())
    for single, group in zip(alone, played(config()).generate(requests()), strict=True):
        for one, many in zip(single.samples, group.samples, strict=True):
            assert many.token_ids[: many.turns[0].end].tolist() == one.token_ids.tolist()


def test_repeated_requests_stay_single_answers(played, engine):
    asked = [*requests(1), replace(requests(2)[1], role=Role.REPEATED)]
    groups = played(config()).generate(asked)
    assert groups[0].samples[0].turns
    assert groups[1].samples[0].turns == () == engine.generate(asked[1:])[0].samples[0].turns


def test_every_answer_is_drawn_as_its_request_says(played, engine):
    """Truncated as a benchmark asks, and cut in the last samples of a group alone."""
    asked = []

    def stream(wave):
        asked.extend(wave)
        return engine.stream(wave)

    (group,) = played(config(), stream).generate([replace(requests(1)[0], top_p=0.9, cuts=Cuts(1, 4, 0.01, 2))])
    turns = {sample.seed: len(sample.turns) for sample in group.samples}
    assert {each.top_p for each in asked} == {0.9}
    cut = [each.cuts for each in asked if each.cuts]
    assert cut == [Cuts(1, 4, 0.01, 2)] * turns[group.samples[-1].seed]


def environment(run):
    return SimpleNamespace(run=run, APART=False, problems=lambda config: ())


async def _raises(recording, given, data):
    await recording.complete(given.token_ids)
    raise KeyError("inside")


async def _hangs(recording, given, data):
    await recording.complete(given.token_ids)
    await asyncio.sleep(60)


async def _endless(recording, given, data):
    said = given.token_ids
    while True:
        said = (*said, *(await recording.complete(said)).drawn.token_ids.tolist(), SYMBOLS.index("="))


async def _large(recording, given, data):
    await recording.complete(given.token_ids)
    await recording.complete((*given.token_ids, *([1] * 10**6)))


async def _silent(recording, given, data):
    return 1.0


def _gives(value):
    async def run(recording, given, data):
        await recording.complete(given.token_ids)
        return value

    return run


@pytest.mark.parametrize(
    ("run", "stop_reason", "error"),
    [
        (_raises, "environment_error", "KeyError: 'inside'"),
        (_hangs, "timeout", "turn_timeout_s"),
        (_endless, "turn_limit", ""),
        (_large, "token_limit", ""),
        (_gives(float("nan")), "environment_error", "reward nan is outside [0, 1]"),
        (_gives(2.0), "environment_error", "reward 2.0 is outside [0, 1]"),
        (_gives("1.0"), "environment_error", "gave a str as reward"),
        (_gives(None), "environment_error", "gave a NoneType as reward"),
        (_gives([0.25, 0.5]), "done", ""),
    ],
)
def test_a_bad_environment_ends_its_own_episode_alone(played, monkeypatch, run, stop_reason, error):
    """Others of the same step go on, and get their reward."""

    async def one_is_bad(recording, given, data):
        return await (run if recording.seed == 1 else _gives(1.0))(recording, given, data)

    monkeypatch.setattr(module, "environment_of", lambda data: environment(one_is_bad))
    (group,) = played(config(turn_timeout_s=0.3)).generate(requests(1))
    bad, *others = group.samples
    assert (bad.stop_reason, error in bad.verifier_error, bool(bad.verifier_error)) == (stop_reason, True, bool(error))
    assert bad.reward == (0.75 if stop_reason == "done" else 0.0)
    assert bad.drawn_tokens > 0
    assert [(each.stop_reason, each.reward, each.correct) for each in others] == [("done", 1.0, True)] * 3


def test_the_time_of_all_turns_together_is_limited_too(played, monkeypatch):
    async def slow(recording, given, data):
        said = await recording.complete(given.token_ids)
        await asyncio.sleep(0.3)
        await recording.complete((*given.token_ids, *said.drawn.token_ids.tolist(), SYMBOLS.index("=")))
        await asyncio.sleep(60)

    monkeypatch.setattr(module, "environment_of", lambda data: environment(slow))
    (group,) = played(config(turn_timeout_s=60.0, timeout_s=1.5)).generate(requests(1, 1))
    assert (group.samples[0].stop_reason, len(group.samples[0].turns)) == ("timeout", 2)
    assert "1.5 s of its own (data.environment.timeout_s)" in group.samples[0].verifier_error


def test_an_episode_without_an_answer_is_left_out_of_training(played, monkeypatch):
    monkeypatch.setattr(module, "environment_of", lambda data: environment(_silent))
    (group,) = played(config()).generate(requests(1))
    assert {(s.finish_reason, len(s.token_ids)) for s in group.samples} == {("abort", 0)}


def test_an_engine_that_fails_ends_the_run(played):
    def broken(asked):
        raise EngineError("gone")
        yield

    with pytest.raises(EngineError, match="gone"):
        played(config(), broken).generate(requests(1))


def test_the_time_of_an_answer_is_not_the_environment_s(played, engine):
    def slow(asked):
        time.sleep(0.5)
        yield from engine.stream(asked)

    (group,) = played(config(turn_timeout_s=0.4, timeout_s=0.4), slow).generate(requests(1))
    assert {sample.stop_reason for sample in group.samples} <= {"done", "turn_limit"}


def test_a_wave_holds_the_turn_of_every_episode_that_plays():
    waves, gate = [], threading.Event()

    def stream(asked):
        waves.append([request.seeds[0] for request in asked])
        for number, request in enumerate(asked):
            yield [(number, SampleGroup(request.prompt, (_sample(request),), request.role))]

    turns = Turns(stream, patience_s=1e6, together=1)
    request = requests(1, 1)[0]
    with turns.playing(3) as ended:
        futures = [turns.ask(replace(request, seeds=(seed,))) for seed in (3, 1)]
        gate.wait(0.05)
        assert not waves
        futures.append(turns.ask(replace(request, seeds=(2,))))
        assert [future.result(10).seed for future in futures] == [3, 1, 2]
        ended()
        pair = [turns.ask(request), turns.ask(request)]
        assert [future.result(10).seed for future in pair] == [1, 1]
    turns.close()
    assert waves == [[1, 2, 3], [1, 1]]


def test_a_long_turn_holds_up_no_other_episode():
    long = threading.Event()

    def stream(asked):
        for number, request in sorted(enumerate(asked), key=lambda each: each[1].seeds == (1,)):
            assert request.seeds != (1,) or long.wait(10)
            yield [(number, SampleGroup(request.prompt, (_sample(request),), request.role))]

    turns = Turns(stream, patience_s=0.01, together=2)
    request = requests(1, 1)[0]
    with turns.playing(2):
        slow = turns.ask(replace(request, seeds=(1,)))
        for turn in range(3):
            assert turns.ask(replace(request, seeds=(2 + turn,))).result(60).seed == 2 + turn
        assert not slow.done()
        long.set()
        assert slow.result(60).seed == 1
    turns.close()


def _sample(request):
    one = np.ones(1, np.int64)
    return Sample(one, -one.astype(np.float32), 1.0, request.seeds[0], request.role, "stop", (WeightSpan(0, 0, 1),))


@pytest.mark.parametrize(
    ("given", "reward"),
    [(1, 1.0), (True, 1.0), (0.5, 0.5), ([0.5, 0.25], 0.75), ([], 0.0), (np.float32(0.5), 0.5), ([np.int64(1)], 1.0)],
)
def test_rewards_of_turns_are_added(given, reward):
    assert reward_of(given) == reward


@pytest.mark.parametrize("given", ["1", None, [1, 1], float("inf"), {"reward": 1}, [0.5, "x"], np.array([1.0])])
def test_what_is_no_reward_is_refused(given):
    with pytest.raises(RewardError, match="reward"):
        reward_of(given)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1+2)*3", "9"),
        ("-3 / 4", "-0.75"),
        ("2 ** 9", "error: only numbers, + - * / and parentheses are known"),
    ],
)
def test_the_calculator(expression, value):
    assert tools.calculated(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "1/0",
        "9" * 300,
        "(" * 150 + "1" + ")" * 150,
        "'a' * 9",
        "1 if 1 else 2",
        "",
        "[1][0]",
        "1e999*0",
        "-" * 100 + "1",
    ],
)
def test_the_calculator_runs_nothing_else(expression):
    said = tools.calculated(expression)
    assert said.startswith("error: ") or said in ("nan", "1")
