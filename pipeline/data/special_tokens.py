"""The ids of a model folder's special tokens, read from its JSON files; nothing is loaded for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data import DataError
from pipeline.model.architecture import of_text


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end a response, at least one.

    Those of ``generation_config.json``, else ``config.json``, else ``tokenizer_config.json``. Raises ``DataError`` when
    none of them names one: responses would never end.
    """
    ids = _token_ids(folder, "eos")
    if not ids:
        raise DataError(
            f"model.hf_path={folder}: no end-of-sequence token: set eos_token_id in generation_config.json "
            "or eos_token in tokenizer_config.json"
        )
    return ids


def pad_token_id(folder: Path) -> int:
    """The padding id, from the same files; failing all three, the first end-of-sequence id."""
    return (_token_ids(folder, "pad") or eos_token_ids(folder))[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file does not exist. Raises ``DataError`` when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _token_ids(folder: Path, name: str) -> tuple[int, ...]:
    """Ids of the special token ``name`` ("eos", "pad"); empty when no file names it. Raises ``DataError``."""
    for file in ("generation_config.json", "config.json"):
        value = of_text(read_json(folder / file)).get(f"{name}_token_id")
        if value is not None:
            ids = tuple(value) if isinstance(value, list) else (value,)
            if not all(type(each) is int for each in ids):
                raise DataError(f"{folder / file}: {name}_token_id={value!r} must be a token's id, or a list of ids")
            return tuple(each for each in ids if each >= 0)  # Llama's first folders have a padding id of -1
    token = read_json(folder / "tokenizer_config.json").get(f"{name}_token")
    content = token.get("content") if isinstance(token, dict) else token
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    return tuple(entry["id"] for entry in added if entry["content"] == content)
