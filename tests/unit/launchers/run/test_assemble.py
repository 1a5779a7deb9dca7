"""Which GPUs engines see, and what is refused before anything starts."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from launchers.run.assemble import shared_gpus, start_engines
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config


def test_colocated_engines_see_the_gpus_of_their_ranks():
    found = shared_gpus(["0", "1", "2", "3", "0", "1"], engines=3, size=2)
    assert [options["num_gpus"] for options in found] == [0, 0, 0], "Ray has given them to the learner's ranks"
    variables = [options["runtime_env"]["env_vars"] for options in found]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables] == ["0,1", "2,3", "0,1"]
    assert {each["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] for each in variables} == {"1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to share")
def test_sharing_without_a_gpu_is_refused(tmp_path):
    keys = ["rollout.placement=colocated", "rollout.engine=sglang"]
    config = load_config(Path("quickstart.yaml"), keys)
    with pytest.raises(ConfigError, match="no CUDA device") as error, ExitStack() as stack:
        start_engines(config, tmp_path, stack)
    assert error.value.problems[0].key == "rollout.placement"
    assert "disaggregated" in error.value.problems[0].remedy
