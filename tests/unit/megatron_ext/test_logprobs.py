import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.logprobs import linear_log_probs_and_entropy, log_probs_and_entropy
from tests.logprobs_cases import case, exact, exact_gradients, loss
from tools.peak_memory import peak_bytes

MIB = 1 << 20
SPACE = 2 * MIB  # what the torch kernel works in on CPU
MOMENT_SPACE = MIB  # and what the squares take in forward


def close(mine, other, tolerance=1e-5):
    torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 5.0), st.integers(0, 10_000), st.floats(0.1, 20.0))
def test_values_match_float64(temperature, seed, scale):
    c = case(seed=seed, scale=scale)
    got = log_probs_and_entropy(c.logits, c.targets, vocab_size=50, group=None, temperature=temperature, moment=True)
    for mine, true in zip(got, exact(c.logits, c.targets, 50, temperature), strict=True):
        assert mine.dtype == torch.float32
        close(mine, true)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 300),
    st.integers(0, 9),
    st.tuples(st.integers(1, 45), st.integers(1, 310)),
    st.floats(0.5, 4.0),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_projection_in_blocks_matches_float64(tokens, columns, padding, tile, scale, entropy_grad, seed):
    """Values and gradients of hidden states and weight, whatever the sizes, the padding and the size of a block."""
    c = case(tokens, columns, padding, seed=seed, scale=scale)
    hidden, weight = c.hidden.clone().requires_grad_(True), c.weight.clone().requires_grad_(True)
    temperature = c.temperature.clamp(min=0.5)
    got = linear_log_probs_and_entropy(
        hidden,
        weight,
        c.targets,
        vocab_size=columns,
        group=None,
        temperature=temperature,
        moment=True,
        entropy_grad=entropy_grad,
        tile=tile,
    )
    product = c.hidden.double() @ c.weight.double().t()
    for mine, true in zip(got, exact(product, c.targets, columns, temperature), strict=True):
        close(mine, true)
    loss(*got[:2], c.upstream, entropy_grad).backward()
    _, true_hidden, true_weight = exact_gradients(c, entropy_grad)
    close(hidden.grad, true_hidden, 1e-5 * (1 + true_hidden.abs().max().item()))
    close(weight.grad, true_weight, 1e-5 * (1 + true_weight.abs().max().item()))
    assert not weight.grad[columns:].any()


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(
    ("tokens", "columns"), [(16, 53), (300, 1000)]
)  # the second: more than the kernel works on at a time
def test_gradients_match_float64(tokens, columns, entropy_grad):
    c = case(tokens, columns, padding=3)
    leaf = c.logits.clone().requires_grad_(True)
    mine = log_probs_and_entropy(leaf * 1, c.targets, vocab_size=columns, group=None, entropy_grad=entropy_grad)
    assert mine[1].requires_grad == entropy_grad
    assert mine[2] is None
    assert mine[3] is None
    close(mine[0], exact(c.logits, c.targets, columns, 1.0)[0])
    loss(*mine[:2], c.upstream, entropy_grad).backward()
    close(leaf.grad, exact_gradients(c, entropy_grad)[0])


def test_entropy_gradient_alone():
    c = case()
    true = c.logits.double().requires_grad_(True)
    exact(true, c.targets, 50, 1.0)[1].sum().backward()
    leaf = c.logits.clone().requires_grad_(True)
    log_probs_and_entropy(leaf * 1, c.targets, vocab_size=50, group=None, entropy_grad=True)[1].sum().backward()
    close(leaf.grad, true.grad)


def test_every_token_has_its_own_temperature():
    c = case()
    got = log_probs_and_entropy(c.logits, c.targets, vocab_size=50, group=None, temperature=c.temperature, moment=True)
    close(got[2], exact(c.logits, c.targets, 50, c.temperature)[2])
    one = log_probs_and_entropy(c.logits, c.targets, vocab_size=50, group=None, temperature=0.7)[2]
    same = log_probs_and_entropy(c.logits, c.targets, vocab_size=50, group=None, temperature=torch.full((16,), 0.7))[2]
    assert torch.equal(one, same)


def test_a_temperature_that_is_not_above_0_gives_nan_there_alone():
    c = case(tokens=4)
    temperature = torch.tensor([1.0, 0.0, -1.0, math.nan])
    log_probs, entropy, tempered, _ = log_probs_and_entropy(
        c.logits, c.targets, vocab_size=50, group=None, temperature=temperature, moment=True
    )
    assert tempered.isnan().tolist() == [False, True, True, True]
    assert not (log_probs.isnan() | entropy.isnan()).any()


def test_tempered_takes_no_gradient():
    c = case()
    leaf = c.logits.requires_grad_(True)
    assert not log_probs_and_entropy(leaf * 1, c.targets, vocab_size=50, group=None, temperature=1.3, moment=True)[
        2
    ].requires_grad


def test_minus_infinity_is_probability_zero():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf], [1.0, 2.0, -math.inf, -math.inf]], requires_grad=True)
    targets = torch.tensor([0, 2])  # the second target is impossible
    got = log_probs_and_entropy(
        logits * 1, targets, vocab_size=4, group=None, temperature=0.05, moment=True, entropy_grad=True
    )
    assert got[0].tolist() == [pytest.approx(-math.log(2)), -math.inf]
    assert got[1][0].item() == pytest.approx(math.log(2))
    assert got[2].tolist() == [pytest.approx(-math.log(2)), -math.inf]
    (got[0][0] + got[1].sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[logits == -math.inf] == 0).all()


def test_a_block_of_minus_infinity_alone_counts_for_nothing():
    """Every token the same logits, some of them -inf, in blocks of two columns of which one has no finite logit."""
    row = torch.tensor([-math.inf, -math.inf, 0.5, -math.inf, 1.5, 0.0])
    got = linear_log_probs_and_entropy(
        torch.ones(2, 1),
        row[:, None],
        torch.tensor([4, 2]),
        vocab_size=6,
        group=None,
        temperature=0.05,
        moment=True,
        tile=(1, 2),
    )
    for mine, true in zip(got, exact(row.expand(2, 6), torch.tensor([4, 2]), 6, 0.05), strict=True):
        close(mine, true)


@pytest.mark.parametrize("where", [0, 49])
def test_a_nan_logit_is_seen(where):
    c = case()
    c.logits[3, where] = math.nan
    got = log_probs_and_entropy(c.logits, c.targets, vocab_size=50, group=None, temperature=1.2, moment=True)
    for result in got:
        assert result.isnan().nonzero().flatten().tolist() == [3]


def test_padded_columns_are_excluded_exactly():
    c = case(columns=40, padding=10)
    whole, cut = c.logits.clone(), c.logits[:, :40].clone()
    whole[:, 40:] = 1e4  # whatever the padding holds
    whole.requires_grad_(True)
    cut.requires_grad_(True)
    padded = log_probs_and_entropy(
        whole * 1, c.targets, vocab_size=40, group=None, temperature=2.0, moment=True, entropy_grad=True
    )
    true = log_probs_and_entropy(
        cut * 1, c.targets, vocab_size=40, group=None, temperature=2.0, moment=True, entropy_grad=True
    )
    assert all(torch.equal(a, b) for a, b in zip(padded, true, strict=True))
    (padded[0] + padded[1]).sum().backward()
    (true[0] + true[1]).sum().backward()
    close(whole.grad[:, :40], cut.grad, 1e-6)  # torch's vector code rounds otherwise at a row's end
    assert (whole.grad[:, 40:] == 0).all()


def test_target_outside_the_vocabulary_gives_nan():
    c = case(tokens=3)
    targets = torch.tensor([45, -1, 3])
    log_probs = log_probs_and_entropy(c.logits, targets, vocab_size=45, group=None)[0]
    assert log_probs.isnan().tolist() == [True, True, False]
    log_probs = linear_log_probs_and_entropy(c.hidden, c.weight, targets, vocab_size=45, group=None, tile=(2, 7))[0]
    assert log_probs.isnan().tolist() == [True, True, False]


def test_collapsed_policy_has_entropy_zero_not_below():
    logits = torch.full((1, 1000), -60.0)
    logits[0, 7] = 60.0
    log_probs, entropy, *_ = log_probs_and_entropy(logits, torch.tensor([7]), vocab_size=1000, group=None)
    assert 0 <= entropy.item() < 1e-6
    assert log_probs.item() == 0


def test_backward_writes_into_the_donated_buffer():
    c = case()
    logits = c.logits.requires_grad_(True)
    buffer = logits * 1
    log_probs = log_probs_and_entropy(buffer, c.targets, vocab_size=50, group=None)[0]
    log_probs.sum().backward(retain_graph=True)
    assert torch.equal(buffer, logits.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


def test_bfloat16():
    """From bf16 logits results are float32's; both routes agree.

    Gradients agree to bf16's 8 bits, at confident tokens too.
    """
    c = case(dtype=torch.bfloat16, scale=12.0)
    leaf = c.logits.clone().requires_grad_(True)
    whole = log_probs_and_entropy(
        leaf * 1, c.targets, vocab_size=50, group=None, temperature=1.2, moment=True, entropy_grad=True
    )
    for mine, true in zip(whole, exact(c.logits, c.targets, 50, 1.2), strict=True):
        close(mine, true)
    loss(*whole[:2], c.upstream, True).backward()
    assert leaf.grad.dtype == torch.bfloat16
    true_logits, _, _ = exact_gradients(c, True)
    assert ((leaf.grad - true_logits).abs() <= true_logits.abs() / 128 + 1e-6).all()

    hidden, weight = c.hidden.clone().requires_grad_(True), c.weight.clone().requires_grad_(True)
    fused = linear_log_probs_and_entropy(
        hidden,
        weight,
        c.targets,
        vocab_size=50,
        group=None,
        temperature=1.2,
        moment=True,
        entropy_grad=True,
        tile=(5, 16),
    )
    for mine, other in zip(fused, whole, strict=True):
        close(mine, other, 1e-4)
    loss(*fused[:2], c.upstream, True).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    for mine, true in (
        (hidden.grad, true_logits @ c.weight.double()),
        (weight.grad, true_logits.t() @ c.hidden.double()),
    ):
        assert (mine - true).abs().max() <= true.abs().max() / 64


def test_no_tokens():
    c = case(tokens=0, columns=8)
    logits, hidden = c.logits.requires_grad_(True), c.hidden.requires_grad_(True)
    whole = log_probs_and_entropy(logits * 1, c.targets, vocab_size=8, group=None, temperature=1.5, moment=True)
    fused = linear_log_probs_and_entropy(hidden, c.weight.requires_grad_(True), c.targets, vocab_size=8, group=None)
    (whole[0].sum() + fused[0].sum()).backward()
    assert whole[0].shape == whole[1].shape == whole[2].shape == fused[1].shape == (0,)
    assert not c.weight.grad.any()


def test_projection_can_be_differentiated_twice_and_in_part():
    """Nothing is donated: the graph serves again; where only one side needs a gradient only that one is made."""
    c = case()
    hidden, weight = c.hidden.requires_grad_(True), c.weight.requires_grad_(True)

    def total(*inputs):
        return linear_log_probs_and_entropy(*inputs, c.targets, vocab_size=50, group=None)[0].sum()

    result = total(hidden, weight)
    first = torch.autograd.grad(result, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(result, (hidden, weight))
    (hidden_alone,) = torch.autograd.grad(total(hidden, weight.detach()), hidden)
    (weight_alone,) = torch.autograd.grad(total(hidden.detach(), weight), weight)
    for a, b, alone in zip(first, second, (hidden_alone, weight_alone), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, alone)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_only_large_tensor(dtype, entropy_grad):
    """Forward and backward work in 2 MiB (forward with the moment 3) beside 16 MiB (8 in bf16) of logits, and backward
    returns their own buffer.
    """
    c = case(tokens=256, columns=1 << 14, dtype=dtype)
    buffer = c.logits.requires_grad_(True) * 1
    forward, results = peak_bytes(
        lambda: log_probs_and_entropy(
            buffer,
            c.targets,
            vocab_size=1 << 14,
            group=None,
            temperature=c.temperature,
            moment=True,
            entropy_grad=entropy_grad,
        )
    )
    total = loss(*results[:2], c.upstream, entropy_grad)
    backward, (gradient,) = peak_bytes(lambda: torch.autograd.grad(total, buffer))
    assert gradient.data_ptr() == buffer.data_ptr()
    assert forward < SPACE + MOMENT_SPACE + 0.1 * MIB
    assert backward < SPACE + 0.1 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_never_holds_the_logits(dtype):
    """A block, the kernel's space, the two gradients; the logits would be 64 MiB (32 in bf16)."""
    tokens, columns, width, size = 512, 1 << 15, 16, dtype.itemsize
    c = case(tokens, columns, hidden=width, dtype=dtype)
    hidden, weight = c.hidden.requires_grad_(True), c.weight.requires_grad_(True)
    block = size * MIB // 4  # 512 x 512 logits
    forward, results = peak_bytes(
        lambda: linear_log_probs_and_entropy(
            hidden, weight, c.targets, vocab_size=columns, group=None, temperature=1.2, moment=True, entropy_grad=True
        )
    )
    total = loss(*results[:2], c.upstream, True)
    backward, _ = peak_bytes(lambda: torch.autograd.grad(total, (hidden, weight)))
    assert forward < SPACE + MOMENT_SPACE + block + 0.2 * MIB  # a little of it is the matrix library's
    assert backward < SPACE + block + columns * width * size + tokens * width * 8 + 0.3 * MIB


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(1, 4), {"temperature": 0.0}, "temperature=0.0: must be above 0"),
        (torch.zeros(1, 4), {"temperature": torch.ones(2)}, r"temperature has shape \[2\], targets \[1\]"),
        (torch.zeros(1, 4), {"kernel": "cuda"}, "kernel='cuda' is not known; choose auto, torch or triton"),
        (torch.zeros(1, 4, requires_grad=True), {}, "logits is a leaf"),
    ],
)
def test_bad_arguments_are_refused(logits, options, message):
    with pytest.raises(ValueError, match=message):
        log_probs_and_entropy(logits, torch.tensor([0]), vocab_size=4, group=None, **options)
