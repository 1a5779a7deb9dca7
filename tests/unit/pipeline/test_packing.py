"""What crosses a process boundary arrives as it left."""

import pickle

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import pack, unpack
from pipeline.types import Actuation, Prompt, Role, Sample, SampleGroup, TrainBatch, WeightSpan

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=3)), max_size=6), st.booleans())
def test_pack_then_unpack_is_bitwise(kinds, transposed):
    tensors = {}
    for i, (dtype, shape) in enumerate(kinds):
        tensor = (torch.randn(shape) * 3).to(dtype)
        tensors[f"t{i}"] = tensor.mT if transposed and tensor.ndim >= 2 else tensor
    back = unpack(*pack(tensors))
    assert list(back) == list(tensors)
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in tensors.items())


def test_a_batch_survives_pickling():
    mask, row, counts = torch.arange(12) % 4 > 1, torch.rand(3), torch.full((3,), 4)
    batch = TrainBatch(
        *(torch.arange(12), mask, counts, counts // 2, row, row, row > 0.5, row > 0.1, row, torch.rand(6)),
        actuation=Actuation("tok", 2.0, 0.5),
    )
    again = pickle.loads(pickle.dumps(batch))
    assert again.actuation == batch.actuation
    assert again.old_log_probs is None
    assert all(torch.equal(getattr(again, n), v) for n, v in vars(batch).items() if isinstance(v, torch.Tensor))


@given(st.lists(st.integers(0, 4), max_size=5))
def test_a_group_survives_pickling(lengths):
    samples = tuple(
        Sample(
            np.arange(n),
            np.arange(n, dtype=np.float32),
            0.7,
            i,
            Role.MAIN,
            "stop",
            (WeightSpan(2, 0, n),),
            "x",
            1.0,
            True,
            "e",
        )
        for i, n in enumerate(lengths)
    )
    group = SampleGroup(Prompt("p", (1, 2), "12", None, "exact"), samples, Role.MAIN)
    back = pickle.loads(pickle.dumps(group))
    assert (back.prompt, back.role, len(back.samples)) == (group.prompt, group.role, len(samples))
    for old, new in zip(samples, back.samples, strict=True):
        assert np.array_equal(old.token_ids, new.token_ids)
        assert np.array_equal(old.log_probs, new.log_probs)
        assert tuple(vars(old).values())[2:] == tuple(vars(new).values())[2:]
