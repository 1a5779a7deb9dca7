"""Text to token ids and back, straight on the Rust tokenizer that ``tokenizer.json`` holds.

``transformers`` (seconds to import) is loaded only when a chat template must be rendered.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
import tokenizers.decoders

from pipeline.data import DataError
from pipeline.data.special_tokens import eos_token_ids, pad_token_id, read_json
from pipeline.model.architecture import of_text

# The byte that each letter of a byte-level vocabulary stands for: printable Latin-1 for itself, the others from 256 on
# (GPT-2).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}

# {"role": "system" | "user" | "assistant" | "tool", "content": ...}, and what a chat template reads beside (tool_calls)
Message = Mapping[str, Any]


def most_tokens(texts: Sequence[str]) -> int:
    """Newest tokens of a response in which any of ``texts`` would be found, however the model spells it.

    A text of n characters has at most 4 n bytes, hence tokens; one more, for some tokenizers strip the first blank.
    """
    return 4 * max(map(len, texts), default=0) + 1


class Tokenizer:
    """The tokenizer of one Hugging Face folder. Build it with ``load_tokenizer``."""

    def __init__(self, folder: Path, eos_token_ids: tuple[int, ...], pad_token_id: int) -> None:
        self.folder = folder
        self._vocabulary = of_text(read_json(folder / "config.json")).get("vocab_size", sys.maxsize)
        self.eos_token_ids = eos_token_ids  # any of these ends a response
        self.pad_token_id = pad_token_id
        self._backend = _backend(folder / "tokenizer.json")
        # Left in the file by whoever last used the tokenizer. Obeyed, they would cut or pad prompts in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._ends = frozenset((*eos_token_ids, pad_token_id))
        self.check(tuple(self._ends))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain text, with the special tokens (e.g. a BOS) that the model expects around it."""
        return self._ids(text, special=True)

    def decode_batch(self, sequences: Sequence[np.ndarray]) -> list[str]:
        """Text of each int array [n], without end-of-sequence and padding tokens.

        Other special tokens stay: a model may have been taught ``<answer>`` as one, and verifiers read it.
        """
        table = self._bytes
        if table is None:
            kept = [[token for token in ids.tolist() if token not in self._ends] for ids in sequences]
            return self._backend.decode_batch(kept, skip_special_tokens=False)
        # mode: ids beyond the table are its last entry, which is empty. The library takes eight times as long.
        pieces = (table.take(ids, mode="clip").tolist() for ids in sequences)
        return [b"".join(piece).decode("utf-8", "replace") for piece in pieces]

    def pieces(self, token_ids: np.ndarray) -> list[str]:
        """The text that each of an int array [n] adds, special tokens included: joined, they are the decoded whole.

        A token that ends inside a character adds "", the one that completes it the character.
        """
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        return [stream.step(self._backend, token) or "" for token in token_ids.tolist()]

    def render_chat(
        self,
        messages: Sequence[Message],
        template: str = "",
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        answer_next: bool = True,
    ) -> str:
        """The conversation as the model's chat template writes it, ready for the assistant's turn.

        ``template`` (Jinja): used in place of the model's. ``variables``: what the template reads beside the messages.
        ``tools``: functions that the model may call, in OpenAI's form. ``answer_next``: whether the assistant's next
        turn is begun. Raises ``DataError`` when there is no chat template or the template refuses these messages.
        """
        import jinja2

        conversation = [dict(message) for message in messages]
        if not (template or self.has_template):
            raise DataError(
                f"{self.folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json; "
                "of several, the one named default): set data.chat_template=false and use plain prompts, name a "
                "template with data.chat_template_file, or choose an instruction-tuned model"
            )
        try:
            rendered = self._chat.apply_chat_template(
                conversation,
                tools=list(tools) or None,
                chat_template=template or None,
                tokenize=False,
                add_generation_prompt=answer_next,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = [message["role"] for message in conversation]
            owner = "data.chat_template_file" if template else f"the chat template of {self.folder}"
            raise DataError(f"{owner} refuses messages with roles {roles}: {error}") from error
        return str(rendered)

    def parse_answer(self, text: str, schema: Mapping[str, Any] | None) -> dict[str, Any]:
        """What ``text``, an answer of the model, says as a message, read by transformers' response parsing.

        ``schema``: how to read it; None: as the folder's ``response_schema`` says. Raises ``ValueError`` or
        ``TypeError`` where the text does not follow the schema.
        """
        return self._chat.parse_response(text, schema) or {}

    @property
    def has_response_schema(self) -> bool:
        """Whether the folder says how its answers are parsed."""
        return getattr(self._chat, "response_schema", None) is not None

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that already holds its special tokens (the output of ``render_chat``): none is added."""
        return self._ids(text, special=False)

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            ids = tuple(self._backend.encode(text, add_special_tokens=special).ids)
        except Exception as error:  # the library knows no narrower one
            reason = f"cannot encode {text[:60]!r}: {error}; use data in words that it knows, or another model"
            raise DataError(f"the tokenizer of {self.folder} {reason}") from error
        self.check(ids)
        return ids

    def check(self, ids: tuple[int, ...]) -> None:
        """Raise ``DataError`` where the model has no embedding for one of ``ids``."""
        if ids and max(ids) >= self._vocabulary:
            token = max(ids)
            raise DataError(
                f"token {self._backend.id_to_token(token)!r} of {self.folder} has id {token}, beyond the model's "
                f"vocabulary of {self._vocabulary} (vocab_size in config.json): use the tokenizer that belongs to the "
                "model, or give the model embeddings for the tokens that were added"
            )

    @cached_property
    def _bytes(self) -> np.ndarray | None:
        """Bytes that each token stands for, object [vocabulary + 1]; None unless the tokenizer is byte-level, when a
        text is its tokens'.
        """
        if not isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel):
            return None
        size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        table = np.full(size + 1, b"", dtype=object)
        for number in range(size):
            token = self._backend.id_to_token(number) or ""
            if number not in self._ends:
                known = all(letter in BYTE_OF for letter in token)
                table[number] = bytes(map(BYTE_OF.__getitem__, token)) if known else token.encode()
        return table

    @cached_property
    def has_template(self) -> bool:
        """Whether the folder has a chat template of its own."""
        template = read_json(self.folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # named templates
            template = next((each.get("template") for each in template if each.get("name") == "default"), None)
        return template is not None or (self.folder / "chat_template.jinja").is_file()

    @cached_property
    def _chat(self) -> Any:
        # Not AutoTokenizer: that one imports the model's configuration class, and with it torchvision where installed.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(self.folder), local_files_only=True)


def _backend(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library knows no narrower one
        raise DataError(f"model.hf_path={file.parent}: tokenizer.json cannot be read ({error}): restore it") from error


def load_tokenizer(hf_path: Path | str) -> Tokenizer:
    """Tokenizer of a Hugging Face folder.

    Raises ``DataError`` when a file is missing or unreadable, or no end-of-sequence token is named anywhere.
    """
    folder = Path(hf_path)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"model.hf_path={folder}: no tokenizer.json there. It must be a Hugging Face folder with a fast tokenizer; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one"
        )
    return Tokenizer(folder, eos_token_ids(folder), pad_token_id(folder))
