"""Multiple choice: the letter that the response ends on."""

from __future__ import annotations

from pipeline.rewards.answers import canonical_answer
from pipeline.types import Prompt

INLINE = True  # time linear in the text and no foreign code: it needs no process of its own


class Verifier:
    r"""1 when the letter that the response ends on is ``answer``: the last ``\boxed{}``, else what follows the last
    "answer is".
    """

    def score(self, prompt: Prompt, text: str) -> float:
        """Linear in the text."""
        return float(canonical_answer("choice", text) == str(prompt.answer).strip().upper())
