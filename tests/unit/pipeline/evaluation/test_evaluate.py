import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import DataConfig, EvaluationConfig, ModelConfig, RolloutConfig, RunConfig
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.evaluate import choose_prompts, evaluate
from pipeline.rewards.stage import VerifierFailedError, VerifierStage
from pipeline.seeds import sample_seed
from pipeline.types import Prompt, Role, Sample, SampleGroup, WeightSpan

PM4 = Path(__file__).resolve().parents[4] / "configs/model/pm4-100k"


class Scripted:
    """An engine that answers every prompt with the given texts in turn."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.requests = tokenizer, texts, []

    def generate(self, requests):
        self.requests = list(requests)
        return [SampleGroup(r.prompt, tuple(map(self.sample, r.seeds, self.texts)), r.role) for r in requests]

    def sample(self, seed, text):
        ids = np.array(self.tokenizer.encode(text))
        zeros = np.zeros(len(ids), np.float32)
        reason = "stop" if ids[-1] == 15 else "abort"
        return Sample(ids, zeros, 1.0, seed, Role.EVALUATION, reason, (WeightSpan(0, 0, len(ids)),))


def run(texts, ids=("a", "b"), **config):
    tokenizer = load_tokenizer(PM4)
    engine = Scripted(tokenizer, texts)
    prompts = [Prompt(i, (1,), "1", "12,03", "countdown") for i in ids]
    settings = RunConfig(
        seed=5,
        model=ModelConfig(hf_path=str(PM4)),
        rollout=RolloutConfig(max_new_tokens=8),
        evaluation=EvaluationConfig(samples=len(texts), **config),
    )
    result = evaluate(engine.generate, VerifierStage(DataConfig(), tokenizer), prompts, settings, step=7)
    return engine, result


def test_an_evaluation_without_a_verdict_ends_with_the_first_error(monkeypatch):
    monkeypatch.setattr("pipeline.rewards.verifiers.countdown.Verifier.score", lambda self, prompt, text: 3.0)
    with pytest.raises(VerifierFailedError, match=r"could judge none of 4 responses.*reward 3.0 is outside \[0, 1\]"):
        run(["1+2$", "2+1$"], k=[1])


def test_figures_by_hand():
    _, result = run(["1+2$", "2+1$", "1+2$", "1+1$", "3$", "1+"], k=[1, 4])
    assert (result.questions, result.samples, result.verifier_errors) == (2, 6, 2)
    assert result.avg == result.mean_reward == 0.5
    assert result.pass_at_k[1].value == pytest.approx(0.5)
    assert result.pass_at_k[4].value == 1.0  # three wrong: any four samples hold a right one
    assert result.maj_at_k[4] == 1.0  # 1+2 leads the first four
    assert result.distinct_correct == 2
    assert result.mean_length == pytest.approx((4 + 4 + 4 + 4 + 2 + 2) / 6)
    assert result.pass_at_k[1].low < 0.5 < result.pass_at_k[1].high
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["pass_at_k"]["1"] == {
        "value": 0.5,
        "low": result.pass_at_k[1].low,
        "high": result.pass_at_k[1].high,
    }
    assert set(plain["maj_at_k"]) == {"1", "4"}


def test_requests_carry_the_evaluation_role_and_their_own_seeds():
    engine, _ = run(["1+2$", "2+1$"], k=[1], temperature=0.6)
    request = engine.requests[1]
    assert (request.role, request.temperature, request.max_new_tokens) == (Role.EVALUATION, 0.6, 8)
    assert request.seeds == tuple(sample_seed(5, 7, "b", i, Role.EVALUATION) for i in range(2))


def test_the_chosen_prompts_depend_on_their_ids_alone():
    prompts = load_prompts(DataConfig(), load_tokenizer(PM4), max_prompt_tokens=8).held_out
    chosen = choose_prompts(prompts, 50)
    assert len(chosen) == 50
    assert [p.id for p in chosen] == sorted((p.id for p in chosen), key=[p.id for p in prompts].index)
    assert {p.id for p in choose_prompts(prompts[::-1], 50)} == {p.id for p in chosen}
    assert choose_prompts(prompts, 1000) == list(prompts)


def test_bad_input():
    with pytest.raises(ValueError, match=r"data\.held_out"):
        run(["1$"], ids=())
    with pytest.raises(ValueError, match=r"evaluation\.k=4 must be between 1 and evaluation\.samples=1"):
        run(["1$"], k=[4])
