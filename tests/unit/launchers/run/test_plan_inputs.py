"""What a run's weight updates are planned from, and the words in which a plan that cannot be made is refused."""

import pytest

from launchers.run.assemble import plan_inputs
from pipeline.config.errors import ConfigError
from pipeline.config.schema import ModelConfig, RolloutConfig, RunConfig, SglangConfig
from pipeline.reshard.engine_grid import EngineGrid
from tests.tiny_folder import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")[0])


def config(folder, **rollout):
    return RunConfig(
        model=ModelConfig(hf_path=folder, dtype="bf16"), runtime="inline", rollout=RolloutConfig(**rollout)
    )


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [([], 1), (["--ep-size", "2", "--log-level", "info"], 2), (["--expert-parallel-size=4"], 4)],
)
def test_expert_groups_are_read_from_the_servers_own_arguments(arguments, groups):
    assert SglangConfig(extra_args=arguments).expert_groups == groups


def test_engines_take_slices_but_whole_tensors_by_disk(folder):
    options = {"engine": "sglang", "engines": 2, "tensor_parallel_size": 2}
    settings = SglangConfig(extra_args=["--ep-size", "2"])
    sliced = plan_inputs(config(folder, sglang=settings, **options))
    assert (sliced.engines, sliced.placement.engines) == (EngineGrid(2, 2, 2), 4)
    whole = plan_inputs(config(folder, sglang=settings, weight_transport="disk", **options))
    assert (whole.engines, whole.placement.engines) == (EngineGrid(1, 1, 2), 2)
    assert sliced.dtype == "bf16"


def test_a_server_that_would_not_divide_the_model_is_refused_before_anything_starts(folder):
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 3\n.*does not divide num_attention_heads=4"):
        plan_inputs(config(folder, engine="sglang", tensor_parallel_size=3))
