"""Model folders with a tokenizer and a chat template, and no weights, for whatever renders conversations.

The templates of ``tests/chat_templates`` are small ones of our own. Each has what is hard in the template of the family
it is named after: see the comment at its head.
"""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.tiny_folder import hf_config

TEMPLATES = Path(__file__).parent / "chat_templates"
NAMES = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
CALLING = ("coder", "llama3", "mistral", "qwen25", "qwen3")  # these show tools
ENDS = ("<|im_end|>", "<|eot|>", "<|end|>", "<|endoftext|>")  # any of them ends an answer
OTHERS = (
    "<|im_start|>",
    "<|begin|>",
    "<|head|>",
    "<|/head|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "<think>",
    "</think>",
)
CORPUS = [
    "You help. What is the answer to this question? The answer is 42, and the question was 6 * 7 = 42.",
    "assistant user system tool the then that check checks checked answer answers answered",
    '{"name": "check", "arguments": {"answer": "6 * 7"}} <tool_call> </tool_call> <tool_response> wrong right',
]


@cache
def _tokenizer() -> str:
    """Byte-level, with merges: a word can be written in several ways."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*ENDS, *OTHERS], initial_alphabet=alphabet)
    built.train_from_iterator(CORPUS * 4, trainer)
    return built.to_str()


def write_chat_folder(folder: Path, template: str) -> Path:
    """A folder whose model has the chat template ``template`` (a name in ``NAMES``; "" for none) and four ends."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer())
    size = tokenizers.Tokenizer.from_str(_tokenizer()).get_vocab_size()
    ends = list(range(len(ENDS)))
    config = {
        **hf_config("llama"),
        "vocab_size": size,
        "eos_token_id": ends,
        "pad_token_id": ENDS.index("<|endoftext|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"eos_token": ENDS[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    if template:
        settings["chat_template"] = (TEMPLATES / f"{template}.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
