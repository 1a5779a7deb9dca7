"""Multiple choice: the letter that the response ends on."""

from __future__ import annotations

from pipeline.rewards.answers import chosen_letter, only_letter
from pipeline.types import Prompt

INLINE = True  # time linear in the text and no foreign code: it needs no process of its own


class Verifier:
    """1 when the letter that the response ends on is ``answer``: a letter from A to T (``B``, ``(B)``, ``B.``), or a
    list of accepted ones.
    """

    @staticmethod
    def extract(text: str) -> str | None:
        """The letter that the response ends on."""
        return chosen_letter(text) or None

    def score(self, prompt: Prompt, text: str) -> float:
        """Linear in the text. Raises ``ValueError`` when a reference is no letter."""
        return float(chosen_letter(text) in _letters(prompt.answer))

    def refusal(self, prompt: Prompt) -> str:
        """Why no response could match a reference; "" where one can."""
        try:
            _letters(prompt.answer)
        except ValueError as error:
            return str(error)
        return ""


def _letters(answer: object) -> list[str]:
    accepted = answer if isinstance(answer, list) else [answer]
    letters = [only_letter(each) if isinstance(each, str) else "" for each in accepted]
    if not letters or not all(letters):
        raise ValueError(
            f"answer {answer!r} is no choice: give a letter from A to T, or a list of accepted letters (a number "
            "could count from 0 or from 1)"
        )
    return letters
