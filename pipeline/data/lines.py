"""Reads one line of a JSONL file as an object, by stricter rules than Python's."""

from __future__ import annotations

import json
from typing import Any

from pipeline.data import DataError


def json_object(line: bytes) -> dict[str, Any]:
    """The object of a line. Raises ``DataError`` with the reason where it is none.

    No key may occur twice, since readers differ in which one they take; no text may hold half a character (a lone
    surrogate), which no tokenizer takes and no file can hold.
    """
    try:
        item = json.loads(line.decode("utf-8-sig").rstrip(), object_pairs_hook=_once)
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}"
        raise DataError(f"{what}; save the file as UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"holds half a character, {error.object[error.start]!r}: write it whole, or remove it"
        ) from error
    except RecursionError as error:
        raise DataError("not JSON that can be read: too many levels, one inside the other") from error
    except DataError:
        raise
    except ValueError as error:  # not JSON, or a number of more digits than Python reads
        raise DataError(
            f"not JSON: {str(error).partition('; use sys')[0]}; every line must be one whole object"
        ) from error
    if not isinstance(item, dict):
        raise DataError(f"must be a JSON object, not {type(item).__name__}")
    return item


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise DataError(f"the key {twice!r} occurs twice: keep one of them")
    return found
