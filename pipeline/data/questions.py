"""A prompt before it is tokenized: what every source yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.tokenizer import Message


@dataclass(frozen=True)
class Question:
    """Either ``text`` or, for a conversation, ``messages``."""

    id: str
    answer: Any
    verifier: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool | None = None  # None: by hash of the id
