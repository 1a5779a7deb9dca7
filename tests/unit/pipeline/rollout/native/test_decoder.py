import pytest
import torch

from pipeline.model.architecture import parse
from pipeline.rollout.native.decoder import Decoder
from tests.decoding import token_log_probs
from tests.tiny_folder import hf_config, write_folder

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("mistral", {}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_logits_equal_transformers(transformers, tmp_path, family, changes):
    folder, tensors = write_folder(tmp_path, family, **changes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(48, (3, 100), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(parse(hf_config(family, **changes)), tensors)
    with torch.inference_mode():
        expected = reference(tokens).logits
        hidden, _ = decoder.prefill(tokens)
        torch.testing.assert_close(decoder.logits(hidden), expected, atol=2e-4, rtol=1e-4)
        log_probs = (expected / 0.7).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_log_probs(decoder, tokens, 0.7), log_probs, atol=3e-4, rtol=1e-4)


def test_reads_the_config_that_transformers_writes(transformers, tmp_path):
    """transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling."""
    changes = {"rope_scaling": LLAMA3, "rope_theta": 5000.0}
    config = transformers.AutoConfig.for_model(**hf_config("llama", **changes))
    assert parse(config.to_dict()) == parse(hf_config("llama", **changes))


def test_steps_through_a_cache_equal_one_pass():
    config = parse(hf_config("qwen3"))
    from tests.tiny_folder import random_tensors

    decoder = Decoder(config, random_tensors(hf_config("qwen3"), 0))
    tokens = torch.randint(48, (2, 300), generator=torch.Generator().manual_seed(1))  # beyond the first rotary table
    hidden, computed = decoder.prefill(tokens[:, :290])
    decoder.reserve(300)
    cache = [(torch.zeros(2, 2, 300, 16), torch.zeros(2, 2, 300, 16)) for _ in range(2)]
    for (keys, values), (new_keys, new_values) in zip(cache, computed, strict=True):
        keys[:, :, :290], values[:, :, :290] = new_keys, new_values
    full = decoder.logits(decoder.prefill(tokens)[0])
    torch.testing.assert_close(decoder.logits(hidden[:, -1]), full[:, 289], atol=1e-4, rtol=1e-4)
    for column in range(290, 300):
        positions = torch.full((2,), column)
        logits = decoder.step(tokens[:, column], positions, cache, column, None)
        torch.testing.assert_close(logits, full[:, column], atol=1e-4, rtol=1e-4)
