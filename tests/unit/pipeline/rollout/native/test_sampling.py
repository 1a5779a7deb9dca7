import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rollout.native.sampling import draw, nucleus, uniform_top, uniforms

MASK = 2**64 - 1


def splitmix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2000))
def test_uniforms_equal_integer_arithmetic(seed, index):
    """torch's signed, wrapping int64 against Python's unbounded integers."""
    bits = splitmix64((splitmix64(seed) + (index + 1) * 0x9E3779B97F4A7C15) & MASK) >> 12
    assert uniforms(torch.tensor([seed]), index + 1)[0, index].item() == (bits + 0.5) / 2**52


def test_uniforms_are_uniform_and_unrelated_across_neighbouring_seeds():
    numbers = uniforms(torch.arange(2000), 50).numpy()
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    expected = numbers.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 4 * np.sqrt(2 * 99)
    flat = numbers - 0.5
    for first, second in ((flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1])):
        assert abs((first * second).mean() * 12) < 4 / np.sqrt(first.size)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_draw_inverts_the_cumulative_distribution(logits, uniform):
    log_probs = torch.tensor([logits]).log_softmax(-1)
    token = int(draw(log_probs, torch.tensor([uniform], dtype=torch.float64)))
    cumulative = log_probs[0].exp().double().cumsum(0).numpy()
    cumulative /= cumulative[-1]
    assert cumulative[token] >= uniform - 1e-12
    assert token == 0 or cumulative[token - 1] <= uniform + 1e-12


@pytest.mark.parametrize("uniform", [2.0**-53, 1 - 2.0**-53])
def test_draw_never_takes_an_impossible_token(uniform):
    log_probs = torch.tensor([[-torch.inf, 0.4, 0.6, -torch.inf]])
    log_probs[0, 1:3] = log_probs[0, 1:3].log()
    assert int(draw(log_probs, torch.tensor([uniform], dtype=torch.float64))) in (1, 2)


def test_nucleus_keeps_the_likeliest_tokens_that_make_up_the_share():
    log_probs = torch.tensor([[0.5, 0.1, 0.3, 0.1]] * 3, dtype=torch.float64).log()
    kept = nucleus(log_probs, torch.tensor([[0.5], [0.75], [1.0]])).exp()
    assert (kept > 0).tolist() == [[True, False, True, False], [True, False, True, False], [True] * 4]
    assert (nucleus(log_probs, torch.tensor([[0.4]] * 3)) > -torch.inf).tolist() == [[True, False, False, False]] * 3
    assert nucleus(log_probs, torch.ones(3, 1)) is log_probs


def test_uniform_top_keeps_likely_tokens_alike():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01], [0.2, 0.2, 0.2, 0.2, 0.2], [0.9, 0.025, 0.025, 0.025, 0.025]])
    got = uniform_top(p.log(), 3, 0.03).exp()
    assert got[0].tolist() == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 0, 0]
    )  # the fourth is likely enough, but not among three
    assert sorted(got[1].tolist()) == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert got[2].tolist() == [1, 0, 0, 0, 0]
    assert uniform_top(p.log(), 9, 0.5).exp()[0].tolist() == [1, 0, 0, 0, 0]
    torch.testing.assert_close(uniform_top(p.log(), 3, 0.95), p.log())  # none reaches the floor
