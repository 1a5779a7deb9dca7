"""Whose layers, and what is said where Transformer Engine or the chip is missing. Its own layers: tests/gpu."""

import importlib.util

import pytest
import torch

from megatron_ext.fp8 import transformer_engine
from megatron_ext.fp8.transformer_engine import Dequantised, Numerics, chip_problem, resolve
from pipeline.config.schema import LearnerConfig, PrecisionConfig
from pipeline.model.layout import canonical

CPU = torch.device("cpu")
FP8 = PrecisionConfig(fp8="hybrid")


def learner(impl="auto", **precision):
    return LearnerConfig(transformer_impl=impl, precision=PrecisionConfig(**precision))


def test_on_a_cpu_the_layers_are_megatron_s_own():
    assert resolve(learner(), CPU).impl == "local"
    emulated = resolve(learner(fp8="e4m3", emulate=True), CPU)
    assert (emulated.impl, emulated.emulated, emulated.fp8) == ("local", True, False)
    assert emulated.transformer_fields(mla=False, moe=False) == {}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            learner(fp8="hybrid"),
            "learner.precision.fp8=hybrid: Transformer Engine needs a CUDA GPU, this learner runs on cpu; "
            "set learner.precision.emulate=true",
        ),
        (
            learner("transformer_engine"),
            "learner.transformer_impl=transformer_engine: Transformer Engine needs a CUDA GPU, "
            "this learner runs on cpu; set learner.transformer_impl=local",
        ),
    ],
)
def test_without_a_gpu(config, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        resolve(config, CPU)
    assert str(error.value) == words


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_without_transformer_engine():
    assert resolve(learner(), torch.device("cuda")).impl == "local"
    with pytest.raises(
        ValueError, match=r"fp8=hybrid: Transformer Engine is not installed; pip install 'isentrope\[gpu\]'"
    ):
        resolve(learner(fp8="hybrid"), torch.device("cuda"))


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "words"),
    [
        ("delayed", (8, 0), "12.9", "needs compute capability 8.9, this GPU has 8.0"),
        ("delayed", (8, 9), "12.1", None),
        ("tensorwise", (9, 0), "12.4", None),
        ("blockwise", (8, 9), "12.9", "needs Hopper"),
        ("blockwise", (9, 0), "12.8", "needs CUDA 12.9, torch was built with 12.8; choose tensorwise"),
        ("blockwise", (9, 0), "12.10", None),
        ("blockwise", (9, 0), "13.0", None),
        ("mxfp8", (9, 0), "13.0", "needs Blackwell (compute capability 10.0), this GPU has 9.0; choose blockwise"),
        ("mxfp8", (10, 3), "13.0", None),
        ("mxfp8", (12, 0), "13.0", "needs Blackwell"),
    ],
)
def test_chips(recipe, capability, cuda, words):
    found = chip_problem(recipe, capability, cuda)
    assert found is None if words is None else found.startswith(words) or words in found


def test_fields_are_those_of_megatron_core():
    """Every field exists there, with a type that takes the value; fusions are on with Transformer Engine alone."""
    from megatron.core.transformer import TransformerConfig

    precision = PrecisionConfig(fp8="hybrid", fp8_recipe="tensorwise", first_last_layers_bf16=True)
    fields = Numerics("transformer_engine", precision).transformer_fields(mla=False, moe=True)
    known = TransformerConfig.__dataclass_fields__
    assert set(fields) <= set(known)
    assert set(fields) >= {name for name in vars(precision) if name != "emulate"}
    assert all(fields[name] for name in ("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"))
    assert fields["gradient_accumulation_fusion"], "Transformer Engine needs no Apex for it"
    plain = Numerics("transformer_engine").transformer_fields(mla=True, moe=False)
    assert not any(name.startswith("fp8") or name == "moe_grouped_gemm" for name in plain)
    assert not plain["apply_rope_fusion"]


def test_the_output_layer_alone_does_without_fused_weight_gradients():
    """megatron-core's own layers refuse the fusion without Apex, which nobody needs for Transformer Engine's."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from megatron_ext import topology
    from pipeline.model.grid import Grid
    from pipeline.ports import free_port

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True)
    config.gradient_accumulation_fusion = True  # as transformer_fields asks for
    topology.initialize(0, ("127.0.0.1", free_port()), Grid(), seed=0)
    try:
        with transformer_engine.own_layers_unfused():
            built = ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.zeros_, bias=False)
        assert not built.gradient_accumulation_fusion
        assert config.gradient_accumulation_fusion, "the other layers' configuration is left alone"
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.zeros_, bias=False)
    finally:
        topology.shutdown()


def test_plain_parameters_pass_through():
    parameters = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(3))}
    read = Dequantised(parameters)
    assert list(read) == ["a", "b"]
    assert all(read[name] is parameters[name] for name in read)
    with transformer_engine.filling(parameters) as writable:
        writable["a"].data.fill_(2)
    assert parameters["a"].tolist() == [2, 2]


def test_place_moves_and_casts_all_but_integers():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("count", torch.ones(1, dtype=torch.int64))
    model.register_buffer("mean", torch.ones(1))
    transformer_engine.place(model, CPU, torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "mean": torch.bfloat16,
        "count": torch.int64,
    }


def test_names_of_transformer_engine_s_layers():
    """Its linear layers hold the norm before them, and one module the experts of a rank."""
    layer = "decoder.layers.3."
    for name, expected in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
        ("mlp.experts.linear_fc2.weight11", "mlp.experts.local_experts.11.linear_fc2.weight"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
        ("pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight"),  # of layers with experts
    ):
        assert canonical(layer + name) == layer + expected
