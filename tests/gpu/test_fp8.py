"""Transformer Engine beside the reference: its quantisers bit for bit, its linear layer, the learner's steps, FP8
parameters.

Written for Transformer Engine 2.20; not yet run on a GPU.
"""

import sys
from pathlib import Path

import pytest
import torch

te = pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
tex = pytest.importorskip("transformer_engine_torch", exc_type=ImportError)

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
import megatron_ranks as ranks  # noqa: E402
import tiny_models  # noqa: E402

from megatron_ext.fp8 import emulate, quantise  # noqa: E402
from megatron_ext.fp8.quantise import E4M3, E5M2, Delayed  # noqa: E402
from megatron_ext.fp8.transformer_engine import chip_problem, is_quantised  # noqa: E402
from pipeline.config.schema import PrecisionConfig  # noqa: E402
from pipeline.ports import free_port  # noqa: E402

pytestmark = pytest.mark.gpu
TE_DTYPE = {E4M3: tex.DType.kFloat8E4M3, E5M2: tex.DType.kFloat8E5M2}
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def needs(recipe):
    problem = chip_problem(recipe, torch.cuda.get_device_capability(), torch.version.cuda)
    if problem:
        pytest.skip(problem)


def matrix(rows, columns, dtype, kind):
    """Normal numbers, many magnitudes, or special ones: zeros, subnormal, huge."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "wide":
        x *= 2.0 ** (20 * torch.randn(rows, columns, generator=generator)).clamp(-120, 100)
    if kind == "special":
        x[: rows // 2] = 0
        x[-1] *= 2.0**-130
        x[-2] *= 2.0**120
    return x.to(dtype).cuda()


def same(theirs, ours):
    """Theirs are bytes, padded; the bits that count are those of ours."""
    size = ours.element_size()
    view = {1: torch.uint8, 4: torch.int32}[size]
    cut = theirs[tuple(slice(0, n) for n in ours.shape)]
    return torch.equal(cut.contiguous().view(view), ours.contiguous().view(view))


cases = pytest.mark.parametrize(
    ("shape", "source", "kind"),
    [
        ((128, 256), torch.bfloat16, "normal"),
        ((256, 384), torch.float32, "wide"),
        ((256, 128), torch.bfloat16, "special"),
        ((64, 160), torch.bfloat16, "normal"),  # blocks cut short
    ],
)
formats = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)


@formats
@cases
def test_tensorwise(shape, source, kind, dtype):
    x = matrix(*shape, source, kind)
    theirs = te.Float8CurrentScalingQuantizer(TE_DTYPE[dtype], device=x.device, rowwise=True, columnwise=False)(x)
    ours = quantise.tensorwise(x, dtype)
    assert same(theirs._data, ours.codes)
    assert same(theirs._scale_inv.reshape(1), ours.scale_inv.reshape(1))


@formats
@cases
def test_blockwise(shape, source, kind, dtype):
    needs("blockwise")
    x = matrix(*shape, source, kind)
    options = {"fp8_dtype": TE_DTYPE[dtype], "rowwise": True, "columnwise": True}
    lines = te.Float8BlockQuantizer(**options, block_scaling_dim=1)
    theirs = lines.update_quantized(x, lines.make_empty(x.shape, dtype=x.dtype, device=x.device))
    rows, columns = quantise.blockwise(x, dtype, (1, 128)), quantise.blockwise(x, dtype, (128, 1))
    assert same(theirs._rowwise_data, rows.codes)
    assert same(theirs._rowwise_scale_inv, rows.scale_inv.T)
    assert same(theirs._columnwise_data, columns.codes.T)
    assert same(theirs._columnwise_scale_inv, columns.scale_inv)
    squares = te.Float8BlockQuantizer(**options, block_scaling_dim=2)
    theirs = squares.update_quantized(x, squares.make_empty(x.shape, dtype=x.dtype, device=x.device))
    ours = quantise.blockwise(x, dtype, (128, 128))
    assert same(theirs._rowwise_data, ours.codes)
    assert same(theirs._rowwise_scale_inv, ours.scale_inv)


@formats
@cases
def test_mxfp8(shape, source, kind, dtype):
    needs("mxfp8")
    x = matrix(*shape, source, kind)
    theirs = te.MXFP8Quantizer(TE_DTYPE[dtype], rowwise=True, columnwise=True)(x)
    for block, codes, scales in (
        ((1, 32), theirs._rowwise_data, theirs._rowwise_scale_inv),
        ((32, 1), theirs._columnwise_data, theirs._columnwise_scale_inv),
    ):
        ours = quantise.mxfp8(x, dtype, block)
        assert same(codes, ours.codes)
        assert same(scales, (ours.scale_inv.view(torch.int32) >> 23).to(torch.uint8))


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_delayed(algorithm):
    history, scale = torch.zeros(4, 1, device="cuda"), torch.ones(1, device="cuda")
    ours = Delayed(torch.zeros(4, device="cuda"), torch.ones((), device="cuda"), E4M3, margin=1, algorithm=algorithm)
    for step, factor in enumerate((1000.0, 1.0, 0.0, 3.0, 1e-30, 2.0)):
        x = matrix(64, 64, torch.bfloat16, "normal") * factor
        theirs = te.Float8Quantizer(scale, history[0], TE_DTYPE[E4M3], rowwise=True, columnwise=False)(x)
        rounded = ours.quantise(x)
        assert same(theirs._data, rounded.codes), step
        assert same(theirs._scale_inv.reshape(1), rounded.scale_inv.reshape(1)), step
        arguments = (history[0].clone(), [history], [scale], algorithm, TE_DTYPE[E4M3], 1)
        tex.fused_amax_and_scale_update_after_reduction(*arguments)
        ours.update()
        assert torch.equal(history[:, 0], ours.history)
        assert torch.equal(scale[0], ours.scale)


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_layer(recipe):
    """Forward and both gradients of its linear layer.

    Sums are rounded to bf16, and on Hopper added up in fewer bits.
    """
    needs(recipe)
    from transformer_engine.common import recipe as recipes

    names = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}
    theirs = getattr(recipes, names.get(recipe, "MXFP8BlockScaling"))(fp8_format=recipes.Format.HYBRID)
    layer = te.Linear(512, 256, bias=False, params_dtype=torch.bfloat16)
    precision = PrecisionConfig(fp8="hybrid", fp8_recipe=recipe, emulate=True)
    operands = emulate.operands(precision, torch.nn.Module().cuda()) if recipe != "delayed" else None
    x, g = matrix(384, 512, torch.bfloat16, "normal"), matrix(384, 256, torch.bfloat16, "normal")
    x.requires_grad_()
    with te.autocast(enabled=True, recipe=theirs):
        y = layer(x)
    y.backward(g)
    found = (y, x.grad, layer.weight.grad)
    if operands is None:
        return  # its first pass is at scale 1; test_delayed has the quantiser
    twin, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    out = emulate.linear(twin, weight, operands)
    out.backward(g)
    for ours, value in zip((out, twin.grad, weight.grad), found, strict=True):
        assert (ours.float() - value.float()).norm() < 1e-2 * value.float().norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dimensions = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    return tiny_models.write(tmp_path_factory.mktemp("qwen3"), tiny_models.config("qwen3", **dimensions))


def train(folder, **config):
    """Three updates of 16 rows of 16 tokens; statistics and exported weights."""
    batches = [ranks.batch(rows=16, seq=17, seed=seed) for seed in range(3)]
    config = {"optimizer": {"lr": 1e-3}, "dtype": "bf16", "micro_batch_size": 16, **config}
    made = ranks.learner(0, 1, ("127.0.0.1", free_port()), folder, 1, 1, **config)
    statistics = [made.update(batch, step) for step, batch in enumerate(batches)]
    weights, quantised = (
        ranks.exported(made),
        sum(is_quantised(p) for chunk in made._chunks for p in chunk.parameters()),
    )
    made.close()
    return statistics, weights, quantised


@pytest.mark.parametrize("recipe", RECIPES)
def test_learner(folder, recipe):
    """Names, shapes and values of Transformer Engine's layers are megatron-core's own; FP8 trains near bf16."""
    needs(recipe)
    own, start, _ = train(folder, transformer_impl="local")
    engine, weights, _ = train(folder, transformer_impl="transformer_engine")
    fp8, *_ = train(folder, precision=PrecisionConfig(fp8="hybrid", fp8_recipe=recipe))
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in start.items()}
    for a, b, c in zip(own, engine, fp8, strict=True):
        assert b.entropy.mean == pytest.approx(a.entropy.mean, rel=0.02)
        assert c.entropy.mean == pytest.approx(a.entropy.mean, rel=0.25)
        assert c.entropy.mean != b.entropy.mean


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_parameters(folder, recipe, tmp_path):
    """Loaded through plain tensors, exported as the values that the codes stand for."""
    needs(recipe)
    config = {
        "precision": PrecisionConfig(fp8="hybrid", fp8_recipe=recipe, fp8_param=True),
        "optimizer": {"lr": 0.0, "distributed": True},
    }
    _, weights, quantised = train(folder, **config)
    assert quantised == 4 * 4
    original = tiny_models.weights(tiny_models.config("qwen3", hidden_size=128, intermediate_size=256, head_dim=32))
    for name, found in weights.items():
        exact = original[name].bfloat16().float()
        error = (found.float().cpu() - exact).norm() / exact.norm()
        assert error < (0.04 if "_proj" in name else 1e-6), name
