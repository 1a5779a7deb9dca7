"""A response that is drawn in parts is the one that is drawn at once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.parts import joined, remainder
from pipeline.types import Cuts, GenerateRequest, Prompt, Role, Sample, SampleGroup, WeightSpan
from tests.tiny_folder import write_folder

PROMPT = Prompt("p", (5, 6, 7), "", None, "exact")
LONGEST = 12


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = NativeEngine(eos_token_ids=tuple(range(4)))  # a token in twelve: some responses end, some are too long
    engine.start(write_folder(tmp_path_factory.mktemp("model"), "qwen3")[0])
    return engine


def parted(engine, request, pauses):
    """The group, held at each of ``pauses`` tokens."""
    for pause in (*pauses, None):
        now = replace(request, pause_at=pause)
        asked = remainder(now)
        (group,) = engine.generate([asked])
        whole = joined(now, group)
        if not any(sample.held for sample in whole.samples):
            return whole
        request = replace(request, begun=whole.samples)
    raise AssertionError("held for ever")


@settings(max_examples=12, deadline=None)
@given(st.sets(st.integers(1, LONGEST - 1)), st.integers(0, 6), st.sampled_from([0.7, 1.0, 1.4]))
def test_parts_make_up_the_response_that_is_drawn_at_once(engine, pauses, cut, temperature):
    request = GenerateRequest(PROMPT, tuple(range(6)), temperature, LONGEST, cuts=Cuts(cut, 3, 0.02, 4))
    (whole,) = engine.generate([request])
    for sample, twin in zip(parted(engine, request, sorted(pauses)).samples, whole.samples, strict=True):
        assert sample.token_ids.tolist() == twin.token_ids.tolist()
        np.testing.assert_allclose(sample.log_probs, twin.log_probs, atol=2e-5)
        assert sample.weight_versions == twin.weight_versions, "one version is one span"
        assert (sample.finish_reason, sample.seed) == (twin.finish_reason, twin.seed)


def sample(seed, tokens, reason, *spans):
    return Sample(np.arange(tokens), np.zeros(tokens, np.float32), 1.0, seed, Role.MAIN, reason, spans)


def test_only_held_responses_are_asked_again_and_every_part_keeps_its_version():
    done = sample(1, 4, "stop", WeightSpan(3, 0, 4))
    held = sample(2, 5, "abort", WeightSpan(3, 0, 5))
    fresh = sample(3, 0, "abort", WeightSpan(3, 0, 0))
    request = GenerateRequest(PROMPT, (1, 2, 3), 1.0, 9, cuts=Cuts(2, 3, 0.1, 0), begun=(done, held, fresh))
    asked = remainder(request)
    assert (asked.seeds, asked.begun, asked.cuts.samples, asked.max_new_tokens) == ((2, 3), (held, fresh), 2, 9)
    new = (sample(2, 4, "length", WeightSpan(4, 0, 4)), sample(3, 2, "abort", WeightSpan(4, 0, 2)))
    first, second, third = joined(request, SampleGroup(PROMPT, new, Role.MAIN)).samples
    assert first is done
    assert (len(second.token_ids), second.finish_reason) == (9, "length")
    assert second.weight_versions == (WeightSpan(3, 0, 5), WeightSpan(4, 5, 9))
    assert third.weight_versions == (WeightSpan(4, 0, 2),)
    assert third.held


def test_a_faulty_response_is_not_asked_again():
    lost = replace(sample(1, 0, "abort"), weight_versions=())
    request = GenerateRequest(PROMPT, (1, 2), 1.0, 9, begun=(lost, sample(2, 1, "abort", WeightSpan(0, 0, 1))))
    assert remainder(request).seeds == (2,)


def test_routes_stay_with_the_weights_that_drew_the_next_token():
    def routed(part, count, mark):
        return replace(part, routes=np.full((len(PROMPT.token_ids) + count - 1, 1, 1), mark, np.uint8))

    begun = routed(sample(1, 4, "abort", WeightSpan(0, 0, 4)), 4, 7)
    request = GenerateRequest(PROMPT, (1,), 1.0, 9, begun=(begun,))
    new = routed(sample(1, 2, "stop", WeightSpan(1, 0, 2)), 6, 8)
    (whole,) = joined(request, SampleGroup(PROMPT, (new,), Role.MAIN)).samples
    assert whole.routes.ravel().tolist() == [7] * 6 + [8] * 2
