"""Updates in FP8 into a real SGLang server of two ranks: its loaders and slices of codes and scales; its kernels need a
GPU.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the sglang extra", allow_module_level=True)

from pipeline.config.schema import RolloutConfig, SglangConfig
from pipeline.model import architecture, fp8, layout
from pipeline.model.architecture import parse
from pipeline.model.fp8 import values
from pipeline.model.grid import Grid
from pipeline.reshard.engine_grid import EngineGrid
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.native.decoder import Decoder
from pipeline.rollout.sglang import fp8 as sglang_fp8
from pipeline.rollout.sglang.engine import SglangEngine, build_transport
from tests.decoding import quantised_names, token_log_probs
from tests.integration.servers import generate_request
from tests.plan_source import Source
from tests.tiny_folder import hf_config, random_tensors, write_folder

# On each of two ranks one block of query, key, value, gate and up rows.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 128,
}
CONFIG = hf_config("qwen3", **SIZES)
TOLERANCE = 0.2  # nats, mean over the tokens: the server computes in bfloat16


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "tests.integration.fp8_on_cpu")
    monkeypatch.setattr(sglang_fp8, "require_device", lambda: None)
    write_folder(tmp_path / "model", "qwen3", **SIZES)
    settings = SglangConfig(max_total_tokens=4096)
    config = RolloutConfig(engine="sglang", tensor_parallel_size=2, weight_dtype="fp8", sglang=settings)
    engine = SglangEngine(config, index=0, log_dir=tmp_path / "logs", seed=1)
    engine.start(tmp_path / "model")
    yield engine
    engine.close()


def weights(version):
    return {name: tensor.bfloat16() for name, tensor in random_tensors(CONFIG, version).items()}


def source(folder, ranks):
    """A learner of two ranks; its quantised weights are what it computes with."""
    return Source(folder, weights, EngineGrid(ranks), Grid(tp=2), dtype="fp8")


def decoder_of(version):
    names = quantised_names(layout.rows(architecture.parse(CONFIG)))
    return Decoder(parse(CONFIG), values(fp8.quantise_tensors(weights(version), names)))


def assert_agrees(groups, decoder):
    for group in groups:
        for sample in group.samples:
            prompt = group.prompt.token_ids
            tokens = torch.tensor([[*prompt, *sample.token_ids.tolist()]])
            ours = token_log_probs(decoder, tokens, sample.temperature)[0, len(prompt) - 1 :].numpy()
            assert np.abs(sample.log_probs - ours).mean() < TOLERANCE


def test_a_server_of_two_ranks_takes_codes_and_scales(engine, tmp_path):
    requests = [generate_request([5, 6, 7], 8), generate_request([9, 4, 20], 8)]
    with pytest.raises(EngineError, match="it has no weights yet; push them first"):
        engine.generate(requests)
    assert engine.health().alive
    for version, transport in ((1, "plan"), (2, "disk"), (3, "plan")):
        engine._transport.close()
        engine._config.weight_transport = transport
        engine._transport = build_transport(engine._config, engine._server, engine._fp8_folder, engine._scratch)
        given = source(tmp_path / "model", 1 if transport == "disk" else 2)
        given.next_version = version
        given.sync(engine, probe=True).push(version)
        groups = engine.generate(requests)
        assert all(sample.drawn_with(version) for group in groups for sample in group.samples)
        assert_agrees(groups, decoder_of(version))

    given = source(tmp_path / "model", 2)
    given.next_version = 9
    with pytest.raises(WeightUpdateError, match="log-probs differ by"):
        given.sync(engine, probe=True).push(4)
