import json

import pytest
import torch

from pipeline.config.schema import RolloutConfig
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.engine import SglangEngine
from pipeline.rollout.sglang.fp8 import make_folder
from pipeline.rollout.sglang.server import SglangServer
from tests.tiny_folder import hf_config, write_folder


def test_the_folder_says_fp8_and_has_no_weights(tmp_path):
    source, _ = write_folder(tmp_path / "model", "qwen3")
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors.index.json").write_text("{}")
    for _ in range(2):  # an engine that is started again
        folder = make_folder(source, tmp_path / "logs" / "model")
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json"}
    assert (folder / "tokenizer.json").read_text() == "{}"
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert config == hf_config("qwen3") == json.loads((source / "config.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_machine_without_a_gpu_is_refused_before_a_server_starts(tmp_path):
    source, _ = write_folder(tmp_path / "model", "qwen3")
    engine = SglangEngine(RolloutConfig(engine="sglang", weight_dtype="fp8"), index=0, log_dir=tmp_path / "l", seed=0)
    with pytest.raises(EngineError, match=r"weight_dtype=fp8: .* no GPU is here; set rollout\.weight_dtype=auto"):
        engine.start(source)
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize("load", [True, False])
def test_without_weights_the_server_begins_with_random_ones(tmp_path, load):
    server = SglangServer(RolloutConfig(), tmp_path, dtype="bfloat16", seed=1, log_path=tmp_path, load_weights=load)
    words = server.command(1)
    assert ("dummy" in words) != load
    assert load or words[words.index("dummy") - 1] == "--load-format"
