"""The Triton kernels against float64 and against torch's, on CUDA; without it in Triton's interpreter
(TRITON_INTERPRET=1).

The interpreter proves the arithmetic, not the machine code; tests/unit/megatron_ext/test_logprobs_triton.py runs it.
"""

import math
import os

import pytest
import torch

from megatron_ext.logprobs import linear_log_probs_and_entropy, log_probs_and_entropy
from tests.logprobs_cases import case, exact, exact_gradients, loss

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET=1"
    ),
]
BLOCK = 64  # columns a program reads at a time


@pytest.fixture(params=["one block a row", "several"])
def blocks(request, monkeypatch):
    from megatron_ext import logprobs_triton

    if request.param == "several":
        monkeypatch.setattr(logprobs_triton, "_MOST_COLUMNS", BLOCK)


def close(mine, other, tolerance=1e-5):
    torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(("columns", "padding"), [(250, 6), (2, 0), (3 * BLOCK, 0)])
def test_from_logits(blocks, columns, padding, entropy_grad):
    c = case(9, columns, padding, seed=columns, scale=6.0, device=DEVICE)
    leaf = c.logits.clone().requires_grad_(True)
    buffer = leaf * 1
    got = log_probs_and_entropy(
        buffer,
        c.targets,
        vocab_size=columns,
        group=None,
        temperature=c.temperature,
        moment=True,
        entropy_grad=entropy_grad,
        kernel="triton",
    )
    for mine, true in zip(got, exact(c.logits, c.targets, columns, c.temperature), strict=True):
        assert mine.dtype == torch.float32
        close(mine, true)
    loss(*got[:2], c.upstream, entropy_grad).backward()
    assert torch.equal(buffer, leaf.grad)  # written in place
    close(leaf.grad, exact_gradients(c, entropy_grad)[0])


def test_bfloat16_logits(blocks):
    c = case(9, 250, scale=6.0, dtype=torch.bfloat16, device=DEVICE)
    leaf = c.logits.clone().requires_grad_(True)
    got = log_probs_and_entropy(
        leaf * 1,
        c.targets,
        vocab_size=250,
        group=None,
        temperature=0.05,
        moment=True,
        entropy_grad=True,
        kernel="triton",
    )
    for mine, true in zip(got, exact(c.logits, c.targets, 250, 0.05), strict=True):
        close(mine, true)
    loss(*got[:2], c.upstream, True).backward()
    true_gradient = exact_gradients(c, True)[0]
    assert ((leaf.grad - true_gradient).abs() <= true_gradient.abs() / 128 + 1e-6).all()


@pytest.mark.parametrize("tile", [None, (4, 100)])
def test_fused_with_the_projection(tile):
    """The running state goes from block to block."""
    c = case(9, 250, padding=6, device=DEVICE)
    hidden, weight = c.hidden.clone().requires_grad_(True), c.weight.clone().requires_grad_(True)
    got = linear_log_probs_and_entropy(
        hidden,
        weight,
        c.targets,
        vocab_size=250,
        group=None,
        temperature=1.2,
        moment=True,
        entropy_grad=True,
        kernel="triton",
        tile=tile,
    )
    for mine, true in zip(got, exact(c.hidden.double() @ c.weight.double().t(), c.targets, 250, 1.2), strict=True):
        close(mine, true)
    loss(*got[:2], c.upstream, True).backward()
    _, true_hidden, true_weight = exact_gradients(c, True)
    close(hidden.grad, true_hidden, 2e-5)
    close(weight.grad, true_weight, 2e-5)


def test_minus_infinity_and_nan(blocks):
    """Probability 0, by whole blocks too; an impossible target; a NaN is seen."""
    c = case(4, 3 * BLOCK, device=DEVICE)
    logits = c.logits
    logits[0, : 2 * BLOCK] = -math.inf
    logits[1, BLOCK + 1 :] = -math.inf
    logits[2, 7] = math.nan
    targets = torch.tensor([3 * BLOCK - 1, 3 * BLOCK - 1, 0, 0], device=DEVICE)
    leaf = logits.clone().requires_grad_(True)
    options = {"vocab_size": 3 * BLOCK, "group": None, "temperature": 0.05, "moment": True, "entropy_grad": True}
    got = log_probs_and_entropy(leaf * 1, targets, **options, kernel="triton")
    other = log_probs_and_entropy(logits.clone(), targets, **options, kernel="torch")
    for mine, theirs in zip(got, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert mine.isnan().tolist() == [False, False, True, False]
    assert got[0][1] == -math.inf
    (got[0][0] + got[1][:2].sum()).backward()
    assert torch.isfinite(leaf.grad[:2]).all()
    assert not leaf.grad[:2][logits[:2] == -math.inf].any()


def test_no_tokens():
    c = case(0, 8, device=DEVICE)
    got = log_probs_and_entropy(
        c.logits.requires_grad_(True) * 1,
        c.targets,
        vocab_size=8,
        group=None,
        temperature=1.5,
        moment=True,
        kernel="triton",
    )
    got[0].sum().backward()
    assert got[2].shape == (0,)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_size(dtype):
    """4096 tokens of a 152k vocabulary over 8 ranks: as the torch kernel says, in no memory but per-token results."""
    c = case(4096, 19008, hidden=64, dtype=dtype, device=DEVICE)
    results = {}
    for kernel in ("torch", "triton"):
        buffer = c.logits.clone().requires_grad_(True) * 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = log_probs_and_entropy(
            buffer,
            c.targets,
            vocab_size=19000,
            group=None,
            temperature=1.2,
            moment=True,
            entropy_grad=True,
            kernel=kernel,
        )
        (gradient,) = torch.autograd.grad(loss(*got[:2], c.upstream, True), buffer)
        assert kernel == "torch" or torch.cuda.max_memory_allocated() - before < 4 << 20
        results[kernel] = (*got, gradient)
    for mine, other in zip(results["triton"], results["torch"], strict=True):
        close(mine, other, 1e-5 if mine.dtype == torch.float32 else 1 / 128)
