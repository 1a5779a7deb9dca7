"""Which experts read each token is asked of a server that can say so, for samples that may be trained on."""

import json

import pytest
import torch

from pipeline.config.schema import RolloutConfig
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.engine import SglangEngine
from pipeline.rollout.sglang.server import SglangServer
from pipeline.types import GenerateRequest, Prompt, Role
from tests.tiny_folder import write_folder

CONFIG = RolloutConfig(engine="sglang")


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_machine_without_a_gpu_is_refused_before_a_server_starts(tmp_path):
    folder, _ = write_folder(tmp_path / "model", "qwen3_moe")
    engine = SglangEngine(CONFIG, index=0, log_dir=tmp_path / "logs", seed=0, record_routes=True)
    with pytest.raises(EngineError, match=r"routing_replay=routes: .* none is here; set it to off, or .*=native"):
        engine.start(folder)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("record", [True, False])
def test_the_server_and_every_request_are_asked(tmp_path, record):
    server = SglangServer(CONFIG, tmp_path, dtype="bfloat16", seed=1, log_path=tmp_path, record_routes=record)
    assert ("--enable-return-routed-experts" in server.command(1)) == record
    engine = SglangEngine(CONFIG, index=0, log_dir=tmp_path, seed=0, record_routes=record)
    for role in Role:
        request = GenerateRequest(Prompt("q", (1, 2), "", 1, "exact"), (7,), 1.0, 10, role)
        asked = json.loads(engine._body(request, 0)).get("return_routed_experts", False)
        assert asked == (record and role != Role.EVALUATION)
