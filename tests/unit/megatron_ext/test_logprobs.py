import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.logprobs import log_probs_and_entropy


def reference(logits, targets, vocab_size, temperature):
    """The same in float64 by autograd, padding cut off first."""
    z = logits.double()[:, :vocab_size]
    rows = torch.arange(len(z))
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
    return log_p[rows, targets], entropy, (z / temperature).log_softmax(-1)[rows, targets]


def case(tokens=16, columns=50, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, columns, generator=generator) * scale
    return logits, torch.randint(0, columns, (tokens,), generator=generator), generator


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 5.0), st.integers(0, 10_000), st.floats(0.1, 20.0))
def test_values_match_float64(temperature, seed, scale):
    logits, targets, _ = case(seed=seed, scale=scale)
    got = log_probs_and_entropy(logits, targets, vocab_size=50, group=None, temperature=temperature)
    for mine, exact in zip(got, reference(logits, targets, 50, temperature), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradients_match_float64(entropy_grad):
    logits, targets, generator = case(columns=53)
    w, v = torch.randn(2, len(targets), generator=generator)
    exact_logits = logits.double().requires_grad_(True)
    log_probs, entropy, _ = reference(exact_logits, targets, 53, 1.0)
    ((log_probs * w).sum() + entropy_grad * (entropy * v).sum()).backward()

    leaf = logits.clone().requires_grad_(True)
    mine = log_probs_and_entropy(leaf * 1, targets, vocab_size=53, group=None, entropy_grad=entropy_grad)
    assert mine[1].requires_grad == entropy_grad
    assert mine[2] is None
    loss = (mine[0] * w).sum()
    (loss + (mine[1] * v).sum() if entropy_grad else loss).backward()
    torch.testing.assert_close(leaf.grad.double(), exact_logits.grad, rtol=0, atol=1e-5)


def test_entropy_gradient_alone():
    logits, targets, _ = case()
    exact_logits = logits.double().requires_grad_(True)
    reference(exact_logits, targets, 50, 1.0)[1].sum().backward()
    leaf = logits.clone().requires_grad_(True)
    log_probs_and_entropy(leaf * 1, targets, vocab_size=50, group=None, entropy_grad=True)[1].sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact_logits.grad, rtol=0, atol=1e-5)


def test_tempered_takes_no_gradient():
    logits, targets, _ = case()
    tempered = log_probs_and_entropy(
        (logits.requires_grad_(True) * 1), targets, vocab_size=50, group=None, temperature=1.3
    )[2]
    assert not tempered.requires_grad


def test_minus_infinity_is_probability_zero():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf], [1.0, 2.0, -math.inf, -math.inf]], requires_grad=True)
    targets = torch.tensor([0, 2])  # the second target is impossible
    got = log_probs_and_entropy(logits * 1, targets, vocab_size=4, group=None, temperature=0.05, entropy_grad=True)
    assert got[0].tolist() == [pytest.approx(-math.log(2)), -math.inf]
    assert got[1][0].item() == pytest.approx(math.log(2))
    assert got[2].tolist() == [pytest.approx(-math.log(2)), -math.inf]
    (got[0][0] + got[1].sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[logits == -math.inf] == 0).all()


def test_padded_columns_are_excluded_exactly():
    logits, targets, _ = case(columns=50)
    targets %= 40
    whole, cut = logits.clone(), logits[:, :40].clone()
    whole[:, 40:] = 1e4  # whatever the padding holds
    whole.requires_grad_(True)
    cut.requires_grad_(True)
    padded = log_probs_and_entropy(whole * 1, targets, vocab_size=40, group=None, temperature=2.0, entropy_grad=True)
    exact = log_probs_and_entropy(cut * 1, targets, vocab_size=40, group=None, temperature=2.0, entropy_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(padded, exact, strict=True))
    (padded[0] + padded[1]).sum().backward()
    (exact[0] + exact[1]).sum().backward()
    torch.testing.assert_close(whole.grad[:, :40], cut.grad, rtol=1e-6, atol=1e-7)  # vector tails round otherwise
    assert (whole.grad[:, 40:] == 0).all()


def test_target_outside_the_vocabulary_gives_nan():
    logits, _, _ = case(tokens=3)
    log_probs = log_probs_and_entropy(logits, torch.tensor([45, -1, 3]), vocab_size=45, group=None)[0]
    assert log_probs.isnan().tolist() == [True, True, False]


def test_collapsed_policy_has_entropy_zero_not_below():
    logits = torch.full((1, 1000), -60.0)
    logits[0, 7] = 60.0
    log_probs, entropy, _ = log_probs_and_entropy(logits, torch.tensor([7]), vocab_size=1000, group=None)
    assert 0 <= entropy.item() < 1e-6
    assert log_probs.item() == 0


def test_backward_writes_into_the_donated_buffer():
    logits, targets, _ = case()
    buffer = logits.requires_grad_(True) * 1
    log_probs = log_probs_and_entropy(buffer, targets, vocab_size=50, group=None)[0]
    log_probs.sum().backward(retain_graph=True)
    assert torch.equal(buffer, logits.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


def test_bfloat16_logits():
    logits, targets, _ = case()
    logits = logits.bfloat16().requires_grad_(True)
    got = log_probs_and_entropy(logits * 1, targets, vocab_size=50, group=None, temperature=1.2)
    for mine, exact in zip(got, reference(logits.detach(), targets, 50, 1.2), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    got[0].sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_no_tokens():
    logits = torch.zeros(0, 8, requires_grad=True)
    log_probs, entropy, _ = log_probs_and_entropy(
        logits * 1, torch.zeros(0, dtype=torch.long), vocab_size=8, group=None
    )
    log_probs.sum().backward()
    assert log_probs.shape == entropy.shape == (0,)


@pytest.mark.parametrize(
    ("logits", "temperature", "message"),
    [
        (torch.zeros(1, 4), 0.0, "temperature=0.0: must be above 0"),
        (torch.zeros(1, 4, requires_grad=True), None, "logits is a leaf"),
    ],
)
def test_bad_arguments_are_refused(logits, temperature, message):
    with pytest.raises(ValueError, match=message):
        log_probs_and_entropy(logits, torch.tensor([0]), vocab_size=4, group=None, temperature=temperature)
