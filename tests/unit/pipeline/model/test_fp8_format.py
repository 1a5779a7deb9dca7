"""The format; its numbers are tested beside the quantiser."""

import pytest
import torch

from pipeline.model import fp8
from pipeline.model.fp8 import quantise
from pipeline.packing import pack, unpack


def codes(rows=130, columns=5):
    return dict(
        zip(
            ("a.weight", "a.weight_scale_inv"),
            quantise(torch.arange(1.0, rows * columns + 1).view(rows, -1)),
            strict=True,
        )
    )


def test_values_stand_under_their_own_names():
    tensors = {"b.weight": torch.ones(2), **codes()}
    found = fp8.values(tensors)
    assert list(found) == ["b.weight", "a.weight"]
    assert found["b.weight"] is tensors["b.weight"]
    exact = torch.arange(1.0, 651.0).view(130, 5)
    assert found["a.weight"].dtype == torch.float32
    assert ((found["a.weight"] - exact).abs() <= exact / 16).all()
    assert not torch.equal(found["a.weight"], exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.weight_scale_inv"), "'a.weight' came as FP8 codes with nothing for 'a.weight_scale_inv'"),
        (lambda t: t.update({"a.weight_scale_inv": torch.ones(1, 1)}), r"torch.float32 of shape \[1, 1\] for"),
        (lambda t: t.update({"a.weight_scale_inv": torch.ones(2, 1).bfloat16()}), r"float32 of shape \[2, 1\] belongs"),
    ],
)
def test_codes_without_their_scale_are_refused(change, message):
    tensors = codes()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        fp8.values(tensors)


def test_a_bucket_of_codes_travels_as_one_buffer():
    tensors = codes()
    found = unpack(*pack(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
