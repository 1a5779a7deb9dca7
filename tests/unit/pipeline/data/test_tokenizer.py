import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import DataError
from pipeline.data.countdown import SYMBOLS
from pipeline.data.special_tokens import eos_token_ids
from pipeline.data.tokenizer import load_tokenizer

PM4 = Path(__file__).resolve().parents[4] / "configs/model/pm4-100k"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(PM4, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_shipped_tokenizer_is_one_token_per_symbol():
    tokenizer = load_tokenizer(PM4)
    assert tokenizer.encode(SYMBOLS) == tuple(range(16))
    assert (tokenizer.eos_token_ids, tokenizer.pad_token_id) == ((15,), 15)
    assert tokenizer.decode_batch([np.array([1, 10, 2, 15]), np.array([], np.int64)]) == ["1+2", ""]


def test_pieces_add_up_to_the_whole(tmp_path):
    assert load_tokenizer(PM4).pieces(np.array([1, 10, 2, 15])) == ["1", "+", "2", "$"]
    assert load_tokenizer(PM4).pieces(np.array([], np.int64)) == []
    shutil.copytree(PM4, tmp_path / "bytes")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["so the the the"], trainer)
    backend.save(str(tmp_path / "bytes" / "tokenizer.json"))
    text = "so the \u2603 the"
    pieces = load_tokenizer(tmp_path / "bytes").pieces(np.array(backend.encode(text).ids))
    assert "".join(pieces) == text
    assert " the" in pieces, "a token keeps its space"
    at = pieces.index("\u2603")
    assert pieces[at - 2 : at] == ["", ""], "three bytes, of which the last completes the character"


def test_special_ids_come_from_the_first_file_that_names_them(folder):
    edit(folder / "generation_config.json", eos_token_id=[3, 15])
    assert load_tokenizer(folder).eos_token_ids == (3, 15)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=7, pad_token_id=None)
    assert load_tokenizer(folder).eos_token_ids == (7,)
    assert load_tokenizer(folder).pad_token_id == 15  # tokenizer_config.json says "$"
    (folder / "config.json").unlink()
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert (load_tokenizer(folder).eos_token_ids, load_tokenizer(folder).pad_token_id) == ((15,), 15)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no end-of-sequence token: set eos_token_id in generation_config"):
        eos_token_ids(folder)


def test_missing_and_broken_files_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config\.json is not valid JSON"):
        load_tokenizer(folder)


SYSTEM_FIRST = [{"role": "system", "content": "9"}, {"role": "user", "content": "1+2"}]


def test_chat_template(folder):
    with pytest.raises(DataError, match="no chat template"):
        load_tokenizer(folder).render_chat([{"role": "user", "content": "1"}])
    template = "{% for m in messages %}{{ m.role | length }}{{ m.content }}{% endfor %}="
    edit(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(SYSTEM_FIRST) == "6941+2="
    assert tokenizer.encode_rendered("6941+2=") == (6, 9, 4, 1, 10, 2, 13)


@pytest.mark.parametrize("template", [None, [{"name": "tool_use", "template": "="}], []])
def test_a_chat_template_that_is_none_is_no_template(folder, template):
    edit(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(DataError, match=r"model has no chat template .*chat_template in tokenizer_config\.json"):
        load_tokenizer(folder).render_chat([{"role": "user", "content": "1"}])


def test_of_several_chat_templates_the_default_is_used(folder):
    named = [{"name": "tool_use", "template": "9"}, {"name": "default", "template": "{{ messages[0].content }}="}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(folder).render_chat([{"role": "user", "content": "1"}]) == "1="


def test_a_template_that_breaks_on_these_messages_is_a_data_error(folder):
    edit(folder / "tokenizer_config.json", chat_template="{{ messages[0].content + 1 }}")
    with pytest.raises(DataError, match="refuses messages with roles"):
        load_tokenizer(folder).render_chat([{"role": "user", "content": "1"}])


def test_truncation_and_padding_left_in_the_file_are_not_obeyed(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8, pad_id=15, pad_token="$")
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("123456") == (1, 2, 3, 4, 5, 6)
    assert load_tokenizer(folder).encode("1") == (1,)


def test_a_token_without_an_embedding_is_refused_when_it_is_first_met(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<tool>"])  # id 16; the model has 16 embeddings
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("12") == (1, 2)
    with pytest.raises(DataError, match=r"token '<tool>' .* has id 16, beyond the model's vocabulary of 16"):
        tokenizer.encode("1<tool>")
    edit(folder / "generation_config.json", eos_token_id=16)
    with pytest.raises(DataError, match=r"token '<tool>' .* has id 16"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("generation_config.json", '{"eos_token_id": "$"}', "eos_token_id='$' must be a token's id"),
        ("generation_config.json", '{"eos_token_id": [15, null]}', "must be a token's id, or a list of ids"),
        ("generation_config.json", '{"eos_token_id": -1}', "no end-of-sequence token"),
    ],
)
def test_a_damaged_tokenizer_is_a_data_error_that_names_the_folder(folder, file, text, said):
    (folder / file).write_text(text)
    with pytest.raises(DataError) as raised:
        load_tokenizer(folder)
    assert (said in str(raised.value), str(folder) in str(raised.value)) == (True, True)


def test_a_padding_id_below_0_is_none(folder):
    edit(folder / "generation_config.json", pad_token_id=-1)
    assert load_tokenizer(folder).pad_token_id == 15


def test_a_refusing_chat_template_is_an_error_naming_the_roles(folder):
    edit(folder / "tokenizer_config.json", chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"roles \['system', 'user'\]: no system role"):
        load_tokenizer(folder).render_chat(SYSTEM_FIRST)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Single bytes, merges of some, and added tokens of every kind, one of which is no byte-level text."""
    folder = tmp_path_factory.mktemp("byte-level")
    shutil.copytree(PM4, folder / "model")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys([*letters, "Ġthe", "ĠâĤ", "¬x", "ĊĊ"])
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "Ġstop"])
    backend.add_tokens(["<answer>", "a b ☃", "Ġâ"])
    backend.save(str(folder / "model/tokenizer.json"))
    edit(folder / "model/config.json", vocab_size=backend.get_vocab_size(), eos_token_id=backend.token_to_id("<|end|>"))
    edit(folder / "model/generation_config.json", eos_token_id=backend.token_to_id("<|end|>"))
    return load_tokenizer(folder / "model"), backend


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 275), max_size=12), max_size=4))
def test_byte_level_text_is_the_library_s(byte_level, sequences):
    """Broken characters too, and ids that nothing stands behind."""
    tokenizer, backend = byte_level
    assert tokenizer._bytes is not None
    ends = {*tokenizer.eos_token_ids, tokenizer.pad_token_id}
    kept = [[token for token in ids if token not in ends] for ids in sequences]
    expected = backend.decode_batch(kept, skip_special_tokens=False)
    assert tokenizer.decode_batch([np.array(ids, np.int64) for ids in sequences]) == expected


def test_a_template_of_ones_own_with_variables(folder):
    """No template in the folder is needed then."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ sign }}"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat([{"role": "user", "content": "1+2"}], template, {"sign": "="}) == "1+2="
    with pytest.raises(DataError, match=r"data\.chat_template_file refuses messages with roles \['user'\]: no"):
        tokenizer.render_chat([{"role": "user", "content": "1"}], "{{ raise_exception('no') }}")
