"""The recipes' rounding rules: numbers by hand, and what holds of every matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.fp8 import quantise
from megatron_ext.fp8.quantise import E4M3, E5M2, Delayed

INF, NAN = math.inf, math.nan
FLOAT32_MAX = torch.finfo(torch.float32).max
RULES = {
    "tensorwise": lambda x, dtype: quantise.tensorwise(x, dtype),
    "blockwise rows": lambda x, dtype: quantise.blockwise(x, dtype, (1, 128)),
    "blockwise columns": lambda x, dtype: quantise.blockwise(x, dtype, (128, 1)),
    "blockwise squares": lambda x, dtype: quantise.blockwise(x, dtype, (128, 128)),
    "mxfp8 rows": lambda x, dtype: quantise.mxfp8(x, dtype, (1, 32)),
    "mxfp8 columns": lambda x, dtype: quantise.mxfp8(x, dtype, (32, 1)),
}
# Half of the distance of neighbouring codes: relative, and of the subnormal ones.
HALF_STEP = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}


def matrix(*rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=dtype)


def same(a, b):
    """Bit for bit; NaN equals NaN, 0 is not -0."""
    width = {1: torch.uint8, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def test_tensorwise_by_hand():
    found = quantise.tensorwise(matrix([896, 17.0], [-1, 0]), E4M3)  # scale 1/2
    assert found.codes.tolist() == [[448, 8], [-0.5, 0]]  # 8.5 lies between 8 and 9: to even
    assert found.scale_inv == 2
    assert found.dequantise().tolist() == [[896, 16], [-1, 0]]
    assert found.dequantise(torch.bfloat16).dtype == torch.bfloat16


def test_blockwise_scales_are_powers_of_two_rounded_down():
    x = torch.zeros(2, 130)
    x[0, :2], x[0, 128] = torch.tensor([3.0, 0.21]), 448.5
    found = quantise.blockwise(x, E4M3, (1, 128))
    assert found.scale_inv.tolist() == [[2.0**-7, 2.0], [1, 1]]  # 448 / 3 = 149.3; 448 / 448.5 < 1; zeros
    assert found.codes[0, [0, 1, 128]].tolist() == [384, 26, 224]  # 0.21 * 128 = 26.88: steps of 2; 224.25: steps of 16
    squares = quantise.blockwise(x, E4M3, (128, 128))
    assert squares.scale_inv.tolist() == [[2.0**-7, 2.0]]
    assert not squares.codes[1].float().any()


def test_mxfp8_by_hand():
    x = torch.zeros(1, 96)
    x[0, 0], x[0, 1], x[0, 32] = 449.0, -1.5, 448.0
    found = quantise.mxfp8(x, E4M3, (1, 32))
    assert found.scale_inv.tolist() == [[2, 1, 2.0**-127]]
    assert found.codes[0, [0, 1, 32, 64]].tolist() == [224, -0.75, 448, 0]


@pytest.mark.parametrize(
    ("amax", "dtype", "exponent"),
    [
        (448.0, E4M3, 127),
        (math.nextafter(448.0, INF) * (1 + 2**-22), E4M3, 128),
        (57344.0, E5M2, 127),
        (1.0, E4M3, 119),  # 1 / 448 lies between 2**-9 and 2**-8
        (0.0, E4M3, 0),
        (448 * 2.0**-127, E4M3, 0),
        (448 * 1.5 * 2.0**-127, E4M3, 1),
        (2.0**-149, E4M3, 0),
        (FLOAT32_MAX, E4M3, 247),
        (INF, E4M3, 254),
    ],
)
def test_shared_exponents(amax, dtype, exponent):
    """OCP MX 1.0: an 8-bit exponent with a bias of 127; Transformer Engine rounds it up."""
    assert quantise.e8m0_of(torch.tensor([amax]), dtype) == exponent


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448.0, 1.0),
        (3.0, 448 / 3),
        (0.0, 1.0),
        (INF, 1.0),
        (1e-42, FLOAT32_MAX),  # 448 / 1e-42 is too large for float32
        (FLOAT32_MAX, 448 / FLOAT32_MAX),
    ],
)
def test_scales(amax, scale):
    assert quantise.scale_of(torch.tensor([amax]), E4M3) == torch.tensor(scale)


@pytest.mark.parametrize(
    ("smallest", "dtype", "exponent"),
    [
        (2.0**-149, torch.float32, -127),  # 448 / amax is too large for float32: the largest power of two instead
        (2.0**-133, torch.bfloat16, -127),
        (2.0**-24, torch.float16, -32),
    ],
)
def test_a_block_of_the_smallest_number(smallest, dtype, exponent):
    found = quantise.blockwise(matrix([smallest], dtype=dtype), E4M3, (1, 128))
    assert found.scale_inv == 2.0**exponent


@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_and_infinity_saturates(rule):
    """As in the kernels: NaN counts for nothing in the largest magnitude, an infinite one leaves a scale of 1 (or
    2**-127).
    """
    found = RULES[rule](matrix([NAN, 2.0, 1.0]), E4M3)
    assert found.codes[0].isnan().tolist() == [True, False, False]
    assert found.dequantise()[0, 1:].tolist() == [2, 1]
    infinite = RULES[rule](matrix([-INF, INF, NAN, 1.0]), E4M3)
    assert infinite.codes[0, :2].tolist() == [-448, 448] or rule.endswith("columns")
    assert infinite.codes[0, 2].isnan()


@st.composite
def matrices(draw):
    """Any shape across block edges, any mixture of magnitudes, with zeros and subnormal numbers."""
    rows, columns = draw(st.integers(0, 140)), draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread, middle = draw(st.sampled_from([0, 1, 8, 40])), draw(st.sampled_from([-130, -20, 0, 60]))
    x = torch.randn(rows, columns, generator=generator)
    x = x * 2.0 ** (middle + spread * torch.randn(rows, columns, generator=generator)).clamp(-140, 120)
    x[torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0, 0.1, 0.95]))] = 0
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(x=matrices(), dtype=st.sampled_from([E4M3, E5M2]))
def test_every_matrix(rule, x, dtype):
    """Error within half a step, zeros exact, codes finite, and rounding again changes nothing."""
    found = RULES[rule](x, dtype)
    values, exact = found.dequantise(torch.float64), x.double()
    relative, absolute = HALF_STEP[dtype]
    spread = quantise.blocks.multiply(torch.ones_like(found.codes), found.scale_inv, found.block, torch.float64)
    # The scale and its reciprocal are rounded to float32, and so are the values.
    bound = torch.maximum(relative * exact.abs(), absolute * spread) * (1 + 2**-20) + exact.abs() * 2**-21 + 2.0**-148
    assert ((values - exact).abs() <= bound).all()
    assert not values[x == 0].any()
    assert found.codes.float().isfinite().all()
    again = RULES[rule](found.dequantise(), dtype)
    if rule == "tensorwise":
        assert again.codes.float().equal(found.codes.float()) or bool(x.abs().max() < 2.0**-110)
    else:
        assert torch.equal(again.dequantise(), found.dequantise())


@settings(max_examples=15, deadline=None)
@given(x=matrices(), dtype=st.sampled_from([E4M3, E5M2]))
def test_the_transpose_rounded_along_rows_is_the_matrix_rounded_along_columns(x, dtype):
    across = ((quantise.blockwise, (1, 128)), (quantise.blockwise, (128, 128)), (quantise.mxfp8, (1, 32)))
    for rule, block in across:
        turned, straight = rule(x.T.contiguous(), dtype, block), rule(x, dtype, block[::-1])
        assert same(turned.codes.T, straight.codes)
        assert same(turned.scale_inv.T, straight.scale_inv)


def test_shards_on_block_edges_round_as_the_whole():
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(3))
    for block in ((1, 128), (128, 1), (128, 128)):
        whole = quantise.blockwise(x, E4M3, block)
        for dim, cut in ((0, 128), (1, 256)):
            parts = [quantise.blockwise(part.contiguous(), E4M3, block) for part in x.tensor_split([cut], dim)]
            assert same(torch.cat([part.codes for part in parts], dim), whole.codes)
            assert same(torch.cat([part.scale_inv for part in parts], dim), whole.scale_inv)


def delayed(length, **options):
    return Delayed(torch.zeros(length), torch.ones(()), E4M3, **options)


def test_delayed_scaling_step_by_step():
    """Scale 1 at first, then from the largest of the last passes.

    A pass of zeros and an infinite one change no scale.
    """
    state = delayed(3)
    assert state.quantise(matrix([1000.0, 17.0])).codes.tolist() == [[448, 16]]  # saturates
    state.update()
    assert state.scale == torch.tensor(448.0) / 1000
    assert state.history.tolist() == [0, 0, 1000]
    for amax, history, largest in (
        (2.0, [0, 1000, 2], 1000.0),
        (4.0, [0, 2, 4], 1000.0),  # the last three
        (0.0, [0, 2, 4], 1000.0),
        (8.0, [0, 4, 8], 8.0),
        (INF, [0, 8, INF], 8.0),
    ):
        state.quantise(matrix([-amax, amax / 2]))
        state.update()
        assert state.history.tolist() == history
        assert state.scale == torch.tensor(448.0) / largest


def test_delayed_scaling_takes_the_largest_of_a_pass_and_the_latest_if_asked():
    state = delayed(4, algorithm="most_recent", margin=2)
    for amax in (100.0, 3.0, 7.0):
        state.quantise(matrix([amax]))
    assert state.history[0] == 100  # one pass, several times
    state.update()
    state.quantise(matrix([7.0]))
    state.update()
    assert state.scale == 112 / 7
    assert state.history.tolist() == [0, 0, 100, 7]
