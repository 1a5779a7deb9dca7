import ast
import importlib.util
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import blocks, fp8, fp8_layout, layout
from pipeline.model.architecture import FAMILIES, Architecture, Mla, Moe
from tests.decoding import quantised_names

MOE = Moe(layers=(False, True), experts=2, ffn=6, top_k=1, shared_ffn=4, expert_bias=True)
TINY = Architecture(FAMILIES["Qwen2ForCausalLM"], 2, 8, 12, 4, 2, 2, 7, 16, 1e-6, 1e4, None, True, qkv_bias=True)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def same(a, b):
    """Bitwise; codes have no ``torch.equal``."""
    a_bits, b_bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a_bits, b_bits)


def test_hand_computed_blocks():
    # Blocks of 2 x 3 over 3 x 4, the last row and column alone. The largest of the first block is 896, so its scale is
    # 2:
    # 17 / 2 = 8.5 lies between 8 and 9 and goes to the even code, 19 / 2 = 9.5 to 10, 2**-9 / 2 is half the smallest
    # code: 0.
    weight = torch.tensor([[896.0, 17.0, 19.0, 448.0], [2.0**-9, -1.0, 0.0, -448.0], [0.0, 0.0, 0.0, -4.48]])
    codes, scale = fp8.quantise(weight, (2, 3))
    assert scale.tolist() == [[2.0, 1.0], [torch.finfo(torch.float32).tiny, pytest.approx(0.01, rel=1e-7)]]
    assert codes.float().tolist() == [[448, 8, 10, 448], [0, -0.5, 0, -448], [0, 0, 0, -448]]
    expected = [[896, 16, 20, 448], [0, -1, 0, -448], [0, 0, 0, weight[2, 3].item()]]
    assert fp8.dequantise(codes, scale, (2, 3)).tolist() == expected


def matrices(rows, columns, dtype, seed):
    """Entries over many powers of two, blocks of zeros and of the type's smallest numbers among them."""
    g = torch.Generator().manual_seed(seed)
    low, high = (-24, 15) if dtype == torch.float16 else (-149, 126)
    exponents = torch.randint(low, high, (rows, columns), generator=g).float()
    if seed % 3 == 0:
        exponents = exponents.clamp_(max=low + 12)
    weight = (torch.randn(rows, columns, generator=g, dtype=torch.float64) * torch.exp2(exponents.double())).to(dtype)
    return weight.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max) * (torch.rand(rows, 1, generator=g) > 0.3).to(
        dtype
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17), DTYPES, st.integers())
def test_error_is_bounded(rows, columns, height, width, dtype, seed):
    weight = matrices(rows, columns, dtype, seed % 2**32)
    before, block = weight.clone(), (height, width)
    codes, scale = fp8.quantise(weight, block)
    assert torch.equal(weight, before)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == fp8_layout.scale_shape((rows, columns), block)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    exact = weight.double()
    spread = scale.double().repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    error = (codes.double() * spread - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, spread * 2**-10 * (1 + 2**-20))).all()
    assert torch.equal(fp8.dequantise(codes, scale, block), codes.float() * spread.float())
    # The largest of each block has the largest code, unless the block is as good as empty.
    least = torch.finfo(torch.float32).tiny
    for i, j in product(*map(range, scale.shape)):
        part = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
        if scale[i, j] > least:
            assert codes[part].float().abs().max() == 448
        amax = weight[part].double().abs().max().item()
        assert scale[i, j].item() == pytest.approx(max(amax / 448, least), rel=2**-23)


@settings(deadline=None)
@given(DTYPES, st.integers(0, 2**32))
def test_no_code_overflows(dtype, seed):
    """Where amax / 448 is rounded down, the largest entry is above 448 scales: it must not become NaN."""
    weight = torch.rand(64, 8, generator=torch.Generator().manual_seed(seed)).to(dtype) + 1
    codes, _ = fp8.quantise(weight, (1, 8))
    assert (codes.float().amax(1) == 448).all()


def test_columns_of_a_larger_tensor_are_read_in_place():
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    for view in (weight.narrow(1, 128, 140), weight.T):
        assert all(same(a, b) for a, b in zip(fp8.quantise(view), fp8.quantise(view.contiguous()), strict=True))


def test_bands_do_not_change_the_bits(monkeypatch):
    weight = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    expected = fp8.quantise(weight, (4, 3))
    monkeypatch.setattr(blocks, "_BAND", 90)  # two block rows at a time
    assert all(same(a, b) for a, b in zip(fp8.quantise(weight, (4, 3)), expected, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        replace(TINY, family=FAMILIES["Qwen3MoeForCausalLM"], moe=MOE),
        replace(TINY, family=FAMILIES["DeepseekV3ForCausalLM"], moe=MOE, mla=Mla(4, 4, 2, 2, 2), tied=False),
    ],
    ids=lambda model: model.family.name,
)
def test_linear_weights_of_layers_are_quantised(model):
    rows = layout.rows(model)
    names = {source.name for row in rows for source in row.sources}
    linear = {name for name in names if re.fullmatch(r"model\.layers\..*_proj(_with_mqa)?\.weight", name)}
    assert quantised_names(rows) == linear
    assert {n for n in names if "experts" in n} <= linear


def test_tensors_by_name():
    tensors = {
        "model.norm.weight": torch.ones(4),
        "a.weight": torch.full((3, 4), 448.0),
        "a.bias": torch.ones(3),
        "b.weight": torch.zeros(3, 4),
    }
    found = fp8.quantise_tensors(tensors, {"a.weight", "elsewhere.weight"})
    assert list(found) == ["model.norm.weight", "a.weight", "a.weight_scale_inv", "a.bias", "b.weight"]
    assert found["a.weight_scale_inv"].tolist() == [[1]]
    assert all(found[name] is tensors[name] for name in ("model.norm.weight", "a.bias", "b.weight"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_fp8_cannot_hold_is_refused(bad):
    weight = torch.ones(3, 5)
    weight[2, 4] = bad
    with pytest.raises(ValueError, match=r"^layer\.weight holds NaN or infinite"):
        fp8.quantise_tensors({"layer.weight": weight}, ["layer.weight"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fp8.quantise(torch.ones(4), name="n.weight"),
            r"n\.weight is torch\.float32 of shape \[4\]: only matrices",
        ),
        (lambda: fp8.quantise(torch.ones(0, 4)), r"shape \[0, 4\]"),
        (lambda: fp8.quantise(torch.ones(2, 2, dtype=torch.float64)), r"torch\.float64"),
        (lambda: fp8.quantise(torch.ones(2, 2).to(fp8.CODES)), r"float8_e4m3fn"),
        (
            lambda: fp8.dequantise(torch.ones(2, 2).to(fp8.CODES), torch.ones(2, 1)),
            r"scale has shape \[2, 1\].*need \[1, 1\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_config():
    assert fp8.quantization_config() == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


def sglang_function(name):
    """A function of SGLang's fp8_utils, without the import of its package, which needs a GPU's libraries."""
    spec = importlib.util.find_spec("sglang")
    if spec is None:
        pytest.skip("SGLang is not installed")
    path = Path(spec.submodule_search_locations[0]) / "srt/layers/quantization/fp8_utils.py"
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope = {"torch": torch, "List": list, "Tuple": tuple, "fp8_dtype": torch.float8_e4m3fn, "_is_fp8_fnuz": False}
    exec(compile(tree, str(path), "exec"), scope)
    return scope[name]


def close(mine, theirs):
    """Theirs multiply by 448 / amax: where a bf16 weight lies between two codes, the other one may be chosen."""
    (codes, scale), (their_codes, their_scale) = mine, theirs
    torch.testing.assert_close(scale, their_scale.view_as(scale), rtol=2**-21, atol=0)
    apart = (codes.view(torch.uint8).int() - their_codes.view(torch.uint8).int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-2


def test_sglang_reads_what_we_write():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = fp8.quantise(weight)
    theirs = sglang_function("block_quant_dequant")(codes, scale, [128, 128], torch.bfloat16)
    assert torch.equal(fp8.dequantise(codes, scale, dtype=torch.bfloat16), theirs)


def test_transformers_reads_what_we_write():
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(**fp8.quantization_config())
    assert config.weight_block_size == [128, 128]

    class Quantizer:
        quantization_config = config

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = fp8.quantise(weight)
    read = theirs.Fp8Dequantize(Quantizer()).convert({"weight$": [codes], "weight_scale_inv": [scale]})["weight"]
    assert torch.equal(read, fp8.dequantise(codes, scale))
    written = theirs.Fp8Quantize(Quantizer()).convert({"a.weight": weight})
    close((codes, scale), (written["a.weight"], written["a.weight_scale_inv"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_gives_the_same_bits(dtype):
    for seed in range(3):
        weight = matrices(1000, 900, dtype, seed)
        cuda = fp8.quantise(weight.cuda())
        assert all(same(a, b.cpu()) for a, b in zip(fp8.quantise(weight), cuda, strict=True))
        assert same(fp8.dequantise(*cuda).cpu(), fp8.dequantise(*fp8.quantise(weight)))
