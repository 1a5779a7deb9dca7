"""Families without a decoder of ours: transformers' own model in the engine's batches, with the weights it is sent."""

import numpy as np
import pytest
import torch

from pipeline.model import architecture
from pipeline.rollout.engine import EngineError
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.native.fallback import TransformersDecoder
from pipeline.types import GenerateRequest, Prompt, Role
from tests.plan_source import Source
from tests.tiny_folder import ARCHITECTURES, write_folder

transformers = pytest.importorskip("transformers")
FAMILIES = ("qwen2_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gpt_oss", "glm4_moe", "deepseek_v3")


def requests():
    """Prompts of three lengths, two temperatures; one prompt has several samples."""
    asked = (([5], 2, 1.0, 9), ([7, 8, 9, 10, 11, 12], 3, 1.3, 12), ([5, 6, 7], 1, 0.7, 1))
    return [
        GenerateRequest(Prompt(str(ids), tuple(ids), "", None, "exact"), tuple(range(n)), temperature, new, Role.MAIN)
        for ids, n, temperature, new in asked
    ]


def exact(folder, prompt, sample):
    """transformers' own log-probs of a sample, from one pass over the folder's weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.tensor([[*prompt, *sample.token_ids.tolist()]])
    with torch.inference_mode():
        log_probs = (model(tokens).logits[0, :-1] / sample.temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_transformers_before_and_after_an_update(tmp_path, family):
    folder, _ = write_folder(tmp_path / "first", family)
    second, tensors = write_folder(tmp_path / "second", family, seed=1)
    engine = NativeEngine()
    engine.start(folder)
    source = Source(folder, lambda version: tensors)
    for serving in (folder, second):
        groups = engine.generate(requests())
        for group, asked in zip(groups, requests(), strict=True):
            assert len(group.samples) == len(asked.seeds)
            for sample in group.samples:
                expected = exact(serving, asked.prompt.token_ids, sample)
                np.testing.assert_allclose(sample.log_probs, expected, atol=2e-5)
        if serving is folder:
            first = [sample.token_ids.tolist() for group in groups for sample in group.samples]
            source.sync(engine).push(1)
            for tensor in tensors.values():  # as the learner's next step may, long before the engine's next batch
                tensor.zero_()
    assert first != [sample.token_ids.tolist() for group in groups for sample in group.samples]


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "glm4_moe", "deepseek_v3"])
def test_samples_carry_the_experts_that_read_them(tmp_path, family):
    """Routers of softmax and of sigmoid with biases, shared experts, layers without any."""
    folder, tensors = write_folder(tmp_path, family)
    model, engine = architecture.read(folder), NativeEngine(record_routes=True)
    engine.start(folder)
    decoder = TransformersDecoder(model, folder, tensors)
    for group, asked in zip(engine.generate(requests()), requests(), strict=True):
        for sample in group.samples:
            routes = []
            with torch.inference_mode():
                decoder.prefill(torch.tensor([[*asked.prompt.token_ids, *sample.token_ids.tolist()][:-1]]), routes)
            expected = torch.stack([layer[0] for layer in routes], dim=1).sort(-1).values
            assert expected.shape[1:] == (sum(model.moe.layers), model.moe.top_k)
            assert np.array_equal(np.sort(sample.routes), expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen2_moe", "qwen3_moe"])
def test_windows_are_kept(tmp_path, family):
    """Of all layers, of the last one (Qwen2), of the first one (Qwen2-MoE)."""
    used = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    folder, _ = write_folder(tmp_path, family, sliding_window=4, **used)
    engine = NativeEngine()
    engine.start(folder)
    for group, asked in zip(engine.generate(requests()), requests(), strict=True):
        for sample in group.samples:
            expected = exact(folder, asked.prompt.token_ids, sample)
            np.testing.assert_allclose(sample.log_probs, expected, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "glm4_moe"])
def test_samples_do_not_depend_on_batching(tmp_path, family):
    folder, _ = write_folder(tmp_path, family)
    whole, single = NativeEngine(), NativeEngine(max_batch_rows=1)
    for engine in (whole, single):
        engine.start(folder)
    for left, right in zip(whole.generate(requests()), single.generate(requests()), strict=True):
        for one, other in zip(left.samples, right.samples, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


def test_other_names_of_a_family_run(tmp_path):
    folder, _ = write_folder(tmp_path / "kimi", "deepseek_v3", model_type="kimi_k2")
    engine = NativeEngine()
    engine.start(folder)
    (group,) = engine.generate(requests()[:1])
    assert len(group.samples) == 2


def test_a_model_that_transformers_makes_of_other_tensors_is_refused(tmp_path):
    folder, tensors = write_folder(tmp_path, "glm4_moe")
    lost = "model.layers.0.self_attn.q_norm.weight"
    del tensors[lost]
    with pytest.raises(EngineError, match="Glm4MoeForCausalLM has other tensors.*" + lost):
        TransformersDecoder(architecture.read(folder), folder, tensors)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_is_served(tmp_path, family):
    """By a decoder of ours, or by transformers'."""
    folder, _ = write_folder(tmp_path, family)
    engine = NativeEngine()
    engine.start(folder)
    assert len(engine.generate(requests()[:1])[0].samples) == 2
