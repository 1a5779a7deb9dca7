"""Equal text, up to white space."""

from __future__ import annotations

from pipeline.rewards.answers import canonical_answer
from pipeline.types import Prompt

INLINE = True  # time linear in the text and no foreign code: it needs no process of its own


class Verifier:
    """1 when the response equals ``answer`` (a string or number, or a list of accepted ones), up to white space."""

    def score(self, prompt: Prompt, text: str) -> float:
        """Linear in the text."""
        accepted = prompt.answer if isinstance(prompt.answer, list) else [prompt.answer]
        given = canonical_answer("exact", text)
        return float(any(given == canonical_answer("exact", str(answer)) for answer in accepted))
