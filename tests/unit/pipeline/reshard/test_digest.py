"""Digests: equal for equal bytes and equal plans, different for anything else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import architecture
from pipeline.model.grid import Grid
from pipeline.reshard.digest import content, plan_digest
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.plan import make_plan

TP2, ENGINES = Grid(tp=2), EngineGrid(2)
TYPES = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8]
# Around one word, one line of 4096 words, and several lines.
LENGTHS = st.one_of(st.integers(0, 40), st.integers(32750, 32790), st.integers(3 * 32768 - 20, 17 * 32768 + 20))


def random_bytes(length, seed):
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(0, 9), st.integers(0, 7), st.sampled_from(TYPES))
def test_neither_place_nor_strides_nor_type_matter(length, seed, offset, dtype):
    data = random_bytes(length - length % 8, seed)
    expected = content(data)
    assert (expected.dtype, expected.shape) == (torch.int64, ())
    moved = torch.empty(len(data) + 64, dtype=torch.uint8)[4 * offset :][: len(data)].copy_(data)
    if offset * 4 % dtype.itemsize == 0:
        assert content(moved.view(dtype)) == expected
    wide = torch.zeros(len(data) // 8, 16, dtype=torch.uint8)
    wide[:, 4:12] = data.view(-1, 8)
    assert content(wide[:, 4:12]) == expected
    assert content(wide[:, 4:12].t().contiguous().t()) == expected


@settings(deadline=None, max_examples=60)
@given(LENGTHS.filter(bool), st.integers(0, 9), st.data())
def test_every_change_shows(length, seed, data):
    original = random_bytes(length, seed)
    at = data.draw(st.integers(0, length - 1))
    changed = original.clone()
    changed[at] += data.draw(st.integers(1, 255))
    assert content(changed) != content(original)
    other = data.draw(st.integers(0, length - 1))
    swapped = original.clone()
    swapped[[at, other]] = original[[other, at]]
    assert (content(swapped) == content(original)) == torch.equal(swapped, original)
    assert content(torch.cat([original, torch.zeros(1, dtype=torch.uint8)])) != content(original)


def test_the_highest_bytes_of_words_that_changed_places_show():
    original = random_bytes(98304, 0)
    seen = content(original)
    for pair in torch.randint(0, 12288, (400, 2), generator=torch.Generator().manual_seed(1)) * 8 + 7:
        swapped = original.clone()
        swapped[pair] = original[pair.flip(0)]
        assert (content(swapped) == seen) == torch.equal(swapped, original)


def test_exchanged_lines_and_columns_show():
    matrix = random_bytes(40 * 32768, 1).view(40, 32768)
    assert len({content(matrix).item(), content(matrix.flip(0)).item(), content(matrix.roll(8, 1)).item()}) == 3


def test_known_values():
    """The digest of one machine is compared with that of another."""
    assert content(torch.arange(100, dtype=torch.float32)).item() == -8638295743943934413
    assert content(torch.arange(20000, dtype=torch.float32)).item() == 6305091711138085372


@pytest.fixture
def model():
    folder = Path(__file__).resolve().parents[4] / "configs/model/qwen3-32b"
    return architecture.parse(json.loads((folder / "config.json").read_text()))


def test_plans_differ_in_their_digest_if_in_anything(model):
    def digest(model=model, learner=TP2, engines=ENGINES, colocated=False, nodes=8, **rest):
        placement = Placement.consecutive(learner.world_size, engines.world_size, colocated, nodes)
        return plan_digest(make_plan(model, learner, engines, placement, **rest))

    same = digest()
    assert digest() == same
    others = [
        digest(model=dataclasses.replace(model, tied=True)),
        digest(model=dataclasses.replace(model, rope_theta=1.0)),
        digest(learner=Grid(tp=1, pp=2)),
        digest(engines=EngineGrid(1, count=2)),
        digest(colocated=True),
        digest(nodes=2),
        digest(bucket_bytes=1 << 28),
        digest(dtype="fp32"),
        digest(dtype="fp8"),
        digest(smallest_share=1),
    ]
    assert len({same, *others}) == 11


def test_a_column_is_summed_as_the_tensor_of_its_entries():
    """A column of scales lies strided, and stays so when it is flattened."""
    column = torch.arange(24, dtype=torch.float32).view(6, 4)[:, 1:2]
    assert content(column) == content(column.clone(memory_format=torch.contiguous_format))
