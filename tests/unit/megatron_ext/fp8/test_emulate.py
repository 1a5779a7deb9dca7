"""One linear layer in emulated FP8: which operand of which product is rounded how, and which layers are left out."""

from collections import namedtuple

import pytest
import torch

from megatron_ext.fp8 import emulate, quantise
from megatron_ext.fp8.quantise import E4M3, E5M2
from pipeline.config.schema import PrecisionConfig

ROWS, COLUMNS, SQUARES = (1, 128), (128, 1), (128, 128)
MX_ROWS, MX_COLUMNS = (1, 32), (32, 1)
Case = namedtuple("Case", "rule x w g")  # blocks of each operand, along its rows and along its columns
CASES = {
    "tensorwise": Case(lambda x, dtype, _: quantise.tensorwise(x, dtype), (None, None), (None, None), (None, None)),
    "blockwise": Case(quantise.blockwise, (ROWS, COLUMNS), (SQUARES, SQUARES), (ROWS, COLUMNS)),
    "mxfp8": Case(quantise.mxfp8, (MX_ROWS, MX_COLUMNS), (MX_ROWS, MX_COLUMNS), (MX_ROWS, MX_COLUMNS)),
}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, w, g = (
        torch.randn(shape, generator=generator).to(dtype) * 2.0 ** torch.randint(-6, 6, shape[-1:], generator=generator)
        for shape in ((3, 50, 200), (140, 200), (3, 50, 140))
    )
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), g.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fp8", "backward"), [("e4m3", E4M3), ("hybrid", E5M2)])
@pytest.mark.parametrize("recipe", CASES)
def test_the_three_products(recipe, fp8, backward, dtype):
    x, w, g = tensors(dtype)
    case = CASES[recipe]

    def rounded(tensor, side, blocks, dtype=E4M3):
        return case.rule(tensor.detach().flatten(0, -2), dtype, blocks[side]).dequantise()

    operands = emulate.operands(PrecisionConfig(fp8=fp8, fp8_recipe=recipe), torch.nn.Module())
    y = emulate.linear(x, w, operands)
    y.backward(g)
    expected = (rounded(x, 0, case.x) @ rounded(w, 0, case.w).T).view(3, 50, 140)
    dx = (rounded(g, 0, case.g, backward) @ rounded(w, 1, case.w)).view(x.shape)
    dw = rounded(g, 1, case.g, backward).T @ rounded(x, 1, case.x)
    for found, value in ((y, expected), (x.grad, dx), (w.grad, dw)):
        assert found.dtype == dtype
        assert torch.equal(found, value.to(dtype))
    exact = x.detach().float() @ w.detach().float().T
    assert 1e-3 < (y.detach().float() - exact).norm() / exact.norm() < 0.06  # rounded indeed, and not by much


def test_without_a_backward_pass_the_result_is_the_same():
    x, w, _ = tensors()
    for recipe in CASES:
        operands = emulate.operands(PrecisionConfig(fp8="hybrid", fp8_recipe=recipe), torch.nn.Module())
        with torch.no_grad():
            still = emulate.linear(x, w, operands)
        assert torch.equal(still, emulate.linear(x, w, operands))


def test_no_tokens_at_all():
    """An expert that no token was sent to."""
    w = torch.randn(4, 8, requires_grad=True)
    for recipe in CASES:
        x = torch.empty(0, 8, requires_grad=True)
        y = emulate.linear(x, w, emulate.operands(PrecisionConfig(fp8="hybrid", fp8_recipe=recipe), torch.nn.Module()))
        y.sum().backward()
        assert y.shape == (0, 4)
        assert x.grad.shape == (0, 8)
        assert not w.grad.any()


@pytest.mark.parametrize(
    ("start", "end", "left_out"), [(1, 1, [0, 5]), (2, 0, [0, 1]), (0, 3, [3, 4, 5]), (0, 0, []), (6, 6, [*range(6)])]
)
def test_first_and_last_layers(start, end, left_out):
    precision = PrecisionConfig(
        fp8="hybrid",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=start,
        num_layers_at_end_in_bf16=end,
    )
    assert [layer for layer in range(6) if precision.in_bf16(layer, 6)] == left_out
    assert not any(PrecisionConfig(fp8="hybrid").in_bf16(layer, 6) for layer in range(6))
