"""SGLang's replies become arrays as they arrive."""

import base64
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.architecture import parse
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang import replies
from pipeline.types import GenerateRequest, Prompt, Role, WeightSpan
from tests.tiny_folder import hf_config

REQUEST = GenerateRequest(Prompt("q", (1, 2), "", 1, "exact"), (7, 8), 0.7, 10, Role.AUXILIARY)
FLOATS = st.floats(-1e30, 0)
TOKENS = st.lists(st.tuples(FLOATS, st.integers(0, 2**31 - 1)), max_size=6)


def body(meta):
    return json.dumps({"text": "", "meta_info": {"id": "x", "finish_reason": {"type": "stop"}} | meta}).encode()


def entries(tokens):
    return [[log_prob, token, None] for log_prob, token in tokens]


@given(TOKENS, TOKENS)
def test_every_token_and_log_prob_arrives(first, second):
    plain = {"weight_version": "3", "output_token_logprobs": entries(first)}
    spans = {"weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]}
    longer = (
        plain
        | spans
        | {"cached_tokens": 2, "output_token_logprobs": entries(second), "finish_reason": {"type": "length"}}
    )
    one, other = replies.sample(body(plain), REQUEST, 7), replies.sample(body(longer), REQUEST, 8)
    for sample, tokens in ((one, first), (other, second)):
        assert (sample.token_ids.dtype, sample.log_probs.dtype) == (np.int64, np.float32)
        assert sample.token_ids.tolist() == [token for _, token in tokens]
        assert sample.log_probs.tolist() == [np.float32(log_prob) for log_prob, _ in tokens]
    assert (one.seed, other.seed, one.temperature, one.role) == (7, 8, 0.7, Role.AUXILIARY)
    assert (one.finish_reason, other.finish_reason) == ("stop", "length")
    assert (one.cached_tokens, other.cached_tokens) == (0, 2)
    assert one.weight_versions == (WeightSpan(3, 0, len(first)),)
    assert other.weight_versions == (WeightSpan(3, 0, 1), WeightSpan(4, 1, 2))


MODEL = parse(hf_config("deepseek_v3", num_hidden_layers=3))  # the first layer is dense; 2 of 4 experts


def test_routes_come_as_sglang_s_record_of_all_layers():
    """Base64 of int32 [tokens - 1, layers, top_k], prompt included; zeros in layers without experts (0.5.21)."""
    recorded = np.arange(3 * 3 * 2, dtype=np.int32).reshape(3, 3, 2) % 4
    recorded[:, 0] = 0
    meta = {"weight_version": "3", "output_token_logprobs": entries([(-1.0, 5), (-2.0, 6)])}
    meta["routed_experts"] = base64.b64encode(recorded.tobytes()).decode()
    sample = replies.sample(body(meta), REQUEST, 7, MODEL)
    assert sample.routes.dtype == np.uint8
    assert np.array_equal(sample.routes, recorded[:, 1:])
    assert replies.sample(body(meta), REQUEST, 7).routes is None


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "no routed_experts in it: the server records none"),
        (np.zeros(5, np.int32), "cannot reshape array of size 5"),
        (np.full((3, 3, 2), 4, np.int32), "experts 4 to 4 of 4"),
    ],
)
def test_a_finished_sample_without_routes_is_refused(record, said):
    meta = {"weight_version": "3", "output_token_logprobs": entries([(-1.0, 5), (-2.0, 6)])}
    meta |= {} if record is None else {"routed_experts": base64.b64encode(record.tobytes()).decode()}
    with pytest.raises(EngineError, match=f"prompt 'q': .*{said}"):
        replies.sample(body(meta), REQUEST, 7, MODEL)
    ended = {"weight_version": "2", "finish_reason": {"type": "abort", "message": "aborted"}}
    assert replies.sample(body(ended), REQUEST, 7, MODEL).routes is None


@pytest.mark.parametrize("nothing", [{}, {"output_token_logprobs": None}, {"output_token_logprobs": []}])
def test_an_aborted_request_has_no_tokens(nothing):
    reply = body({"weight_version": "2", "finish_reason": {"type": "abort", "message": "aborted"}} | nothing)
    sample = replies.sample(reply, REQUEST, 7)
    assert (len(sample.token_ids), sample.finish_reason) == (0, "abort")
    assert vars(sample).keys() == vars(replies.aborted(REQUEST, 7, 2)).keys()
    assert replies.aborted(REQUEST, 7, 2).weight_versions == sample.weight_versions == (WeightSpan(2, 0, 0),)


def test_a_log_prob_that_is_no_number_is_nan():
    """JSON has none: the server writes null."""
    sample = replies.sample(body({"weight_version": 1, "output_token_logprobs": [[None, 5, None]]}), REQUEST, 7)
    assert np.isnan(sample.log_probs).tolist() == [True]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (body({"finish_reason": {"type": "abort", "status_code": 400, "message": "too long"}}), "prompt 'q': too long"),
        (b"[]", "another form than SGLang's for prompt 'q': "),
        (b'{"error": "x"}', "another form than SGLang's for prompt 'q': "),
        (body({"output_token_logprobs": [["x", 1, None]]}), "another form than SGLang's for prompt 'q': .*float"),
    ],
)
def test_what_is_no_answer_is_said(answer, said):
    with pytest.raises(EngineError, match=said):
        replies.sample(answer, REQUEST, 7)


def test_the_samples_of_many_replies_take_little_memory():
    """As JSON lists their 200,000 tokens would take 27 MB."""
    one = {"weight_version": "1", "output_token_logprobs": entries([(-0.25 - i / 7, 1000 + i) for i in range(5000)])}
    reply = body(one)
    tracemalloc.start()
    drawn = [replies.sample(reply, REQUEST, 7) for _ in range(40)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 200_000 + 2e6
    assert sum(len(sample.token_ids) for sample in drawn) == 200_000
