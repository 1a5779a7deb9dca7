"""What waits comes back from a checkpoint bit for bit."""

import json
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoints import CheckpointError, CheckpointStore
from pipeline.step.draw import Drawing
from pipeline.step.queue import RolloutQueue, _Ahead
from pipeline.step.waiting import Drawn, drawn_of, plain_of
from pipeline.types import ControlDecision, Prompt, Role, Sample, SampleGroup, StepSamples, WeightSpan
from tests.saving import saved

FLOATS = st.floats(width=32, allow_nan=False)
TEXTS = st.text(st.characters(), max_size=8)  # surrogates too: a tokenizer's bytes need not be UTF-8
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
PROMPTS = st.builds(
    Prompt,
    id=TEXTS,
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    text=TEXTS,
    answer=JSON,
    verifier=st.just("exact"),
    meta=st.dictionaries(TEXTS, JSON, max_size=3),
)


@st.composite
def samples(draw, role):
    tokens = draw(st.lists(st.tuples(st.integers(0, 2**31 - 1), FLOATS), max_size=6))
    spans = draw(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 9), st.integers(0, 9)), max_size=3))
    return Sample(
        np.array([token for token, _ in tokens], np.int64),
        np.array([log_prob for _, log_prob in tokens], np.float32),
        draw(st.floats(0.1, 3)),
        draw(st.integers(0, 2**63 - 1)),
        role,
        draw(st.sampled_from(["stop", "length", "abort"])),
        tuple(WeightSpan(version, start, end) for version, start, end in spans),
        draw(TEXTS),
        draw(st.floats(0, 1)),
        draw(st.booleans()),
        draw(TEXTS),
        routes=draw(
            st.none() | st.integers(1, 9).map(lambda read: np.arange(6 * read, dtype=np.uint16).reshape(-1, 3, 2))
        ),
    )


def groups(role):
    one = st.builds(SampleGroup, PROMPTS, st.lists(samples(role), max_size=3).map(tuple), st.just(role))
    return st.lists(one, max_size=3)


DRAWN = st.builds(
    Drawn,
    st.integers(0, 2**40),
    st.builds(ControlDecision, st.floats(0, 2), st.floats(0, 2), st.integers(0, 9), TEXTS, TEXTS, st.floats(0, 1)),
    st.builds(StepSamples, groups(Role.MAIN), groups(Role.AUXILIARY), st.integers(0, 9), groups(Role.REPEATED)),
)


def bits(sample):
    arrays = {name: getattr(sample, name) for name in ("token_ids", "log_probs", "routes")}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return vars(sample) | {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def essence(drawn):
    """All of it, comparable by ``==``, which tells -0.0 from 0.0 in arrays. ``gain`` and the like may be NaN."""
    parts = [drawn.samples.main, drawn.samples.auxiliary, drawn.samples.repeated]
    return (
        drawn.version,
        str(drawn.decision),
        drawn.samples.stale,
        [[(group.prompt, group.role, list(map(bits, group.samples))) for group in part] for part in parts],
    )


def through_a_checkpoint(folder, waiting):
    fields, arrays = plain_of(waiting)
    made = saved(CheckpointStore(folder, keep_last=1), 1, {"queue": fields}, arrays)
    return drawn_of(made.state()["queue"], made.arrays())


@settings(max_examples=60, deadline=None)
@given(st.lists(DRAWN, max_size=3))
def test_what_waits_survives_a_checkpoint_bit_for_bit(tmp_path_factory, waiting):
    back = through_a_checkpoint(tmp_path_factory.mktemp("checkpoints"), waiting)
    assert list(map(essence, back)) == list(map(essence, waiting))


def waiting(rows=2, tokens=5):
    rng = np.random.default_rng(0)
    sample = Sample(
        rng.integers(0, 99, tokens),
        rng.standard_normal(tokens).astype(np.float32),
        1.0,
        2**62 + 1,
        Role.MAIN,
        "stop",
        (WeightSpan(4, 0, 3), WeightSpan(5, 3, tokens)),
        "1+2 is drei \N{SNOWMAN}",
        1 / 3,
    )
    prompt = Prompt("q1", (1, 2, 3), "text", {"numbers": [1, 2]}, "countdown", {"level": 3})
    decision = ControlDecision(1.37, 1.37, 4, "tracking", "H in band", 0.3, 0.31, 0.02)
    group = SampleGroup(prompt, tuple(replace(sample, seed=seed) for seed in range(rows)), Role.MAIN)
    return Drawn(4, decision, StepSamples([group], [], 2))


def test_a_queue_goes_on_from_a_checkpoint(tmp_path):
    before, after = RolloutQueue.__new__(RolloutQueue), RolloutQueue.__new__(RolloutQueue)
    before._waiting = deque(_Ahead(Drawing.of(drawn)) for drawn in (waiting(), waiting(rows=3)))
    fields, arrays = before.state_dict()
    made = saved(CheckpointStore(tmp_path, keep_last=1), 1, {"queue": fields}, arrays)
    after.load_state_dict(made.state()["queue"], made.arrays())
    assert [essence(each.result()) for each in after._waiting] == [essence(each.result()) for each in before._waiting]


def test_tokens_are_kept_in_arrays_alone_in_12_bytes_each():
    fields, arrays = plain_of([waiting(rows=4, tokens=1000)])
    assert len(json.dumps(fields)) < 2000
    assert sum(array.nbytes for array in arrays.values()) < 4 * (12 * 1000 + 200)


def test_damage_to_what_waits_is_named(tmp_path):
    fields, arrays = plain_of([waiting()])
    store = CheckpointStore(tmp_path, keep_last=1)
    file = saved(store, 1, {"queue": fields}, arrays).path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.safetensors differs"):
        store.latest()
