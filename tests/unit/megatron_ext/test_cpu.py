import pytest
import torch

from megatron_ext import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is a no-op with CUDA")


def test_cuda_names_mean_the_cpu():
    cpu.install()  # a second time: nothing is wrapped twice
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert not torch.cuda.is_available()


def test_device_contexts_still_hold():
    """transformers builds its models inside one; were it ignored, their buffers would hold garbage."""
    with torch.device("meta"):
        assert torch.ones(1).device.type == "meta"
        assert torch.tensor([1.0]).device.type == "meta"
    assert torch.zeros(1).device.type == "cpu"


def test_tensor_types_match_both_names():
    name = torch.zeros(1).type()
    assert name == "torch.FloatTensor"
    assert name == "torch.cuda.FloatTensor"
    assert name != "torch.cuda.HalfTensor"
    assert name in ["torch.cuda.FloatTensor"]
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_cuda_random_state_is_the_cpu_state():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)
