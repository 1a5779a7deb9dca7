"""Routes between engine and learner: their type, their layers, and an answer that went on under other weights."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model import routing
from pipeline.model.architecture import parse
from tests.tiny_folder import hf_config

MODEL = parse(hf_config("deepseek_v3", num_hidden_layers=3))  # the first layer is dense; 2 of 4 experts


def test_an_engine_s_record_loses_its_dense_layers():
    recorded = np.arange(5 * 3 * 2).reshape(5, 3, 2) % 4
    routes = routing.of_all_layers(recorded.astype(np.int32), MODEL)
    assert routes.dtype == np.uint8
    assert np.array_equal(routes, recorded[:, 1:])


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (np.zeros((5, 2, 2)), r"\(5, 2, 2\), not \[tokens - 1, 3, 2\]"),
        (np.zeros((5, 6)), r"\(5, 6\)"),
        (np.full((5, 3, 2), 4), "experts 4 to 4 of 4"),
        (np.full((5, 3, 2), -1), "experts -1 to -1 of 4"),
    ],
)
def test_a_record_of_another_form_is_refused(recorded, said):
    with pytest.raises(ValueError, match=said):
        routing.of_all_layers(recorded, MODEL)
    with pytest.raises(ValueError, match="a qwen3 model, which has no experts"):
        routing.of_all_layers(recorded, parse(hf_config("qwen3")))


def test_bytes_of_one_token():
    """Qwen3-235B-A22B: 94 layers of 8 among 128 experts; 512 experts take two bytes each."""
    moe = replace(MODEL.moe, layers=(True,) * 94, experts=128, top_k=8)
    assert routing.token_bytes(moe) == 752
    assert routing.token_bytes(replace(moe, experts=256)) == 752
    assert routing.token_bytes(replace(moe, experts=512)) == 1504


@given(st.integers(0, 9), st.integers(0, 9))
def test_a_token_has_the_routes_of_the_weights_that_read_it_first(read, more):
    """Version 1 read so many tokens, version 2 all of them and more: no token has a part of either."""
    before, after = np.full((read, 3, 2), 1, np.uint8), np.full((read + more, 3, 2), 2, np.uint8)
    routes = routing.continued(before, after)
    assert routes.dtype == np.uint8
    assert routing.continued(before, None) is before
    assert routing.continued(None, after) is after
    assert [set(token.ravel().tolist()) for token in routes] == [{1}] * read + [{2}] * more
