"""Equal text, up to white space; equal numbers where both are numbers."""

from __future__ import annotations

from pipeline.rewards.answers import after_thinking, number_or_text
from pipeline.types import Prompt

INLINE = True  # time linear in the text and no foreign code: it needs no process of its own


class Verifier:
    """1 when what the response says after its thinking equals ``answer`` (a string or number, or a list of accepted
    ones), up to white space. Numbers are compared as numbers: ``12.0`` is ``12``.
    """

    @staticmethod
    def extract(text: str) -> str | None:
        """What follows the thinking."""
        return " ".join((after_thinking(text) or "").split()) or None

    def score(self, prompt: Prompt, text: str) -> float:
        """Linear in the text. Raises ``ValueError`` when a reference is neither text nor a number."""
        accepted = _accepted(prompt.answer)
        said = after_thinking(text)
        return float(said is not None and number_or_text(said) in accepted)

    def refusal(self, prompt: Prompt) -> str:
        """Why no response could match a reference; "" where one can."""
        try:
            _accepted(prompt.answer)
        except ValueError as error:
            return str(error)
        return ""


def _accepted(answer: object) -> list[str]:
    accepted = answer if isinstance(answer, list) else [answer]
    for each in accepted:
        if isinstance(each, bool) or not isinstance(each, str | int | float) or not str(each).strip():
            raise ValueError(f"answer {answer!r}: {each!r} is neither text nor a number: give one, or a list of them")
    if not accepted:
        raise ValueError("answer []: list at least one accepted answer")
    return [number_or_text(str(each)) for each in accepted]
