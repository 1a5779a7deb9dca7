import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import DataError
from pipeline.data.cursor import DataCursor, fingerprint
from pipeline.types import Prompt


def prompts(n, token=1):
    return [Prompt(str(i), (token, i), "", "", "exact") for i in range(n)]


def ids(batch):
    return [prompt.id for prompt in batch]


@given(st.integers(1, 20), st.lists(st.integers(0, 20), max_size=30), st.integers(0, 3))
def test_epochs_without_replacement_and_no_repetition_in_a_batch(count, sizes, seed):
    cursor = DataCursor(prompts(count), seed)
    stream = []
    for size in sizes:
        batch = ids(cursor.take(min(size, count)))
        assert len(set(batch)) == len(batch) == min(size, count)
        stream += batch
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(map(int, stream[start : start + count])) == list(range(count))


@given(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=12), st.lists(st.integers(1, 12), max_size=12))
def test_resume_is_exact(count, before, after):
    cursor = DataCursor(prompts(count), 3)
    for size in before:
        cursor.take(min(size, count))
    resumed = DataCursor(prompts(count), 3)
    resumed.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    for size in after:
        assert ids(cursor.take(min(size, count))) == ids(resumed.take(min(size, count)))
    assert cursor.state_dict() == resumed.state_dict()


def test_the_seed_and_the_epoch_change_the_order():
    first, second = DataCursor(prompts(50), 0), DataCursor(prompts(50), 1)
    epoch_0 = ids(first.take(50))
    assert epoch_0 != ids(second.take(50))
    assert epoch_0 != ids(first.take(50))
    assert first.epoch == 1


def test_the_order_of_the_source_is_kept_in_every_epoch():
    cursor = DataCursor(prompts(5), 0, shuffled=False)
    assert [ids(cursor.take(2)) for _ in range(4)] == [["0", "1"], ["2", "3"], ["4", "0"], ["1", "2"]]
    with pytest.raises(DataError, match="order"):
        DataCursor(prompts(5), 0).load_state_dict(cursor.state_dict())


def test_other_prompts_or_another_seed_refuse_the_state():
    state = DataCursor(prompts(5), 0).state_dict()
    with pytest.raises(DataError, match=f"{fingerprint(prompts(5))}.*has 6 with fingerprint {fingerprint(prompts(6))}"):
        DataCursor(prompts(6), 0).load_state_dict(state)
    with pytest.raises(DataError, match="fingerprint"):
        DataCursor(prompts(5, token=2), 0).load_state_dict(state)
    with pytest.raises(DataError, match="seed 0, this run has seed=1"):
        DataCursor(prompts(5), 1).load_state_dict(state)


def test_too_few_prompts():
    with pytest.raises(DataError, match=r"rollout\.prompts_per_step=6 exceeds the 5"):
        DataCursor(prompts(5), 0).take(6)
    with pytest.raises(DataError, match="no prompts"):
        DataCursor([], 0)
