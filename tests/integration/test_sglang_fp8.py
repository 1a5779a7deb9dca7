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
from pipeline.model import architecture, fp8, fp8_layout, layout
from pipeline.model.architecture import parse
from pipeline.model.checksum import checksum
from pipeline.model.fp8 import values
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.native.decoder import Decoder, token_log_probs
from pipeline.rollout.sglang import fp8 as sglang_fp8
from pipeline.rollout.sglang.engine import SglangEngine, build_transport
from pipeline.rollout.transport import Deadline
from pipeline.types import WeightBucket
from tests.integration.servers import generate_request
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
    rows = layout.rows(architecture.parse(CONFIG))
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(CONFIG, version).items()}
    return fp8.quantise_tensors(tensors, fp8_layout.quantised_names(rows))


def push(engine, version, tensors):
    """In two buckets; scales travel with their codes."""
    names = sorted(name for name in tensors if not name.endswith("_scale_inv"))
    engine.begin_update(version)
    for i in range(2):
        part = {n: tensors[n] for name in names[i::2] for n in (name, fp8_layout.scale_name(name)) if n in tensors}
        engine.load_bucket(WeightBucket(version, i, 2, part, checksum(part)))
    engine.verify_update(version)
    engine.commit_update(version)


def assert_agrees(groups, tensors):
    decoder = Decoder(parse(CONFIG), values(tensors))
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
    for version, transport in ((1, "tensor"), (2, "disk"), (3, "tensor")):
        engine._transport.close()
        engine._config.weight_transport = transport
        engine._transport = build_transport(engine._config, engine._server, engine._fp8_folder, engine._scratch)
        engine._transport.connect(Deadline(60))
        sent = weights(version)
        push(engine, version, sent)
        groups = engine.generate(requests)
        assert all(sample.drawn_with(version) for group in groups for sample in group.samples)
        assert_agrees(groups, sent)

    wrong = dict(sent)
    name = fp8_layout.scale_name("model.layers.0.mlp.down_proj.weight")
    wrong[name] = torch.full_like(sent[name], 100.0)
    engine._verifier.expect = lambda version, tensors, keep=engine._verifier.expect: keep(
        version, {n: sent[n] for n in tensors}
    )
    with pytest.raises(WeightUpdateError, match="log-probs differ by"):
        push(engine, 4, wrong)
