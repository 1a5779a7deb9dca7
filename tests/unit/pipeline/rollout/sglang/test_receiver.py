"""Whether a server's parameters are those that the plan fills, on stand-ins of their shapes."""

import base64
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from pipeline.model import architecture
from pipeline.model.grid import Grid
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.order import Order, PlanInputs
from pipeline.reshard.plan import make_plan
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.receiver import _Parameters, receive
from pipeline.rollout.sglang.slices import SliceTransport
from pipeline.rollout.transport import Deadline
from tests.tiny_folder import hf_config
from tests.unit.pipeline.reshard.test_engine_parameters import written

TP = 4  # ranks, two of which share each of two key-value heads


def places(family, larger=None, dim=0, by=16):
    """What the first engine rank's receiver makes of parameters of the plan's shapes, one of them ``larger``."""
    plan = make_plan(architecture.parse(hf_config(family)), Grid(), EngineGrid(TP), Placement.consecutive(1, TP, False))
    shapes = {name: list(counts.shape) for name, counts in written(plan, 1).items()}
    if larger:
        shapes[larger][dim] += by
    parameters = {name: torch.ones(shape) for name, shape in shapes.items()}
    return _Parameters(parameters, torch.device("cpu")).shards(plan, 1)


LAYER = "model.layers.1."


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_parameters_of_the_plans_shapes_pass(family):
    assert places(family)


@pytest.mark.parametrize(
    ("family", "parameter", "dim"),
    [
        ("qwen3", "self_attn.qkv_proj.weight", 0),  # SGLang's padded heads on a CPU
        ("qwen3", "self_attn.o_proj.weight", 1),
        ("qwen2", "self_attn.qkv_proj.bias", 0),
        ("qwen3", "input_layernorm.weight", 0),
        ("deepseek_v3", "self_attn.fused_qkv_a_proj_with_mqa.weight", 0),
    ],
)
def test_a_larger_parameter_is_named_with_what_to_do(family, parameter, dim):
    with pytest.raises(ValueError, match="dimension") as error:
        places(family, LAYER + parameter, dim)
    assert LAYER + parameter in str(error.value)
    assert "rollout.tensor_parallel_size" in str(error.value)
    assert "rollout.weight_transport=disk" in str(error.value)


@pytest.mark.parametrize(
    ("family", "parameter", "dim"),
    [
        ("qwen3", LAYER + "mlp.gate_up_proj.weight", 0),
        ("qwen3", LAYER + "mlp.down_proj.weight", 1),
        ("qwen3_moe", LAYER + "mlp.experts.w13_weight", 1),
        ("qwen3_moe", LAYER + "mlp.experts.w2_weight", 2),
        ("qwen3", "model.embed_tokens.weight", 0),
        ("qwen3", "lm_head.weight", 0),
    ],
)
def test_padding_that_adds_nothing_passes(family, parameter, dim):
    assert places(family, parameter, dim)


def test_a_report_that_cannot_be_written_does_not_end_the_server(tmp_path):
    """An exception in the loader would; the engine says what is missing instead."""

    def post(path, *, serialized_named_tensors, **_):
        scratch.rmdir()
        receive(torch.nn.Linear(1, 1), pickle.loads(base64.b64decode(serialized_named_tensors[0])))

    scratch = tmp_path / "scratch"
    inputs = PlanInputs(str(tmp_path), Grid(), EngineGrid(1), Placement.consecutive(1, 1, False), 1 << 16, "fp32")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    order = Order(0, 1, inputs, "", ("127.0.0.1", store.port), 0, 0.1)
    with pytest.raises(EngineError, match=r"left no report of the update .* is the disk full\?"):
        SliceTransport(SimpleNamespace(post=post), 1, scratch).receive(order, 0, Deadline(1.0))
