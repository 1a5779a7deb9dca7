"""Stop texts and ids at a real SGLang server."""

import importlib.util

import pytest
import tokenizers

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the sglang extra", allow_module_level=True)

from pipeline.config.schema import RolloutConfig, SglangConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rollout.sglang.engine import SglangEngine
from pipeline.types import GenerateRequest, Prompt
from tests.tiny_folder import write_folder

pytestmark = pytest.mark.xdist_group("sglang")


@pytest.fixture
def folder(tmp_path):
    """A random Llama that draws bytes."""
    folder = write_folder(tmp_path / "model", "llama", vocab_size=256, eos_token_id=0)[0]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_stop_texts_and_ids_end_a_response_and_stay_in_it(folder, tmp_path):
    """The first of these letters, the run's or the request's, ends a response. It is the last token, and drawn."""
    tokenizer = load_tokenizer(folder)
    (z,) = tokenizer.encode("z")
    texts, ends = ["a", "b"], {*"abcdz"}
    settings = SglangConfig(dtype="float32", max_total_tokens=8192)
    config = RolloutConfig(engine="sglang", stop=texts, stop_token_ids=[z], sglang=settings)
    engine = SglangEngine(config, index=0, log_dir=tmp_path, seed=0, own_stops=True)
    prompt = Prompt("p", tokenizer.encode("hello"), "", None, "exact")
    try:
        engine.start(folder)
        (group,) = engine.generate([GenerateRequest(prompt, tuple(range(64)), 1.5, 60, stop=("c", "d"))])
    finally:
        engine.close()
    last = []
    for sample in group.samples:
        assert len(sample.token_ids) == len(sample.log_probs)
        letters = tokenizer.pieces(sample.token_ids)
        assert not ends & {*letters[:-1]}
        if letters[-1] in ends:
            assert sample.finish_reason == "stop"
            last.append(letters[-1])
    assert {*last} >= {"a", "c", "z"}
