"""Mathematical equality, as math-verify (a library of Hugging Face) finds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isfinite
from typing import Any

from pipeline.rewards.answers import final_answer
from pipeline.rewards.mathematics import certainly_equal_to_itself, equal, parse
from pipeline.rewards.notation import plain_latex, rational
from pipeline.types import Prompt

LIBRARY = "math_verify"  # what its start-up time goes into importing
_LONGEST = 2000  # characters of an answer; longer ones are no answers to a question that has a short one


class Verifier:
    r"""1 when math-verify finds the response's answer equal to ``answer``: LaTeX or plain text, a number, or a list of
    accepted alternatives.

    The response's answer is ``final_answer``'s. Spellings of numbers, units, currencies and powers are folded first
    (``plain_latex``). The response must equal the whole reference; a reference is never read in part.
    """

    def __init__(self) -> None:
        parse("1")  # imports the library now, not in the first timed call

    @staticmethod
    def extract(text: str) -> str | None:
        """The response's answer as it is written there."""
        return final_answer(text)

    def score(self, prompt: Prompt, text: str) -> float:
        """Raises ``ValueError`` when a reference is not mathematics. Time is bounded by the caller only."""
        golds = [_reference(reference) for reference in references(prompt.answer)]
        answer = final_answer(text)
        if answer is None or len(answer) > _LONGEST:
            return 0.0
        parsed = parse(plain_latex(answer))
        return float(any(equal(gold, parsed) for gold in golds))

    def refusal(self, prompt: Prompt) -> str:
        """Why no response could match a reference; "" where one can."""
        try:
            for reference in references(prompt.answer):
                if not equal(_reference(reference), parse(reference)):
                    return f"answer {reference!r} does not equal itself when math-verify reads it: write it in LaTeX"
        except ValueError as error:
            return str(error)
        return ""


def references(answer: Any) -> Sequence[str]:
    """The accepted answers in ``plain_latex``. Raises ``ValueError`` for what is no mathematical expression."""
    accepted = answer if isinstance(answer, list) else [answer]
    for each in accepted:
        written = isinstance(each, str) or (
            not isinstance(each, bool) and isinstance(each, int | float) and isfinite(each)
        )
        if not written or not plain_latex(str(each)):
            raise ValueError(
                f"answer {each!r} is no mathematical expression: give LaTeX, a number, or a list of accepted ones"
            )
        if len(str(each)) > _LONGEST:
            raise ValueError(
                f"answer {str(each)[:40]!r}... has {len(str(each))} characters: at most {_LONGEST} are read"
            )
    if not accepted:
        raise ValueError("answer [] is no mathematical expression: list at least one")
    return [plain_latex(str(each)) for each in accepted]


def certainly_mathematics(answer: Any) -> bool:
    """Whether ``answer`` needs no library to be known to equal itself."""
    try:
        return all(rational(each) is not None or certainly_equal_to_itself(each) for each in references(answer))
    except ValueError:
        return False


@lru_cache(maxsize=4096)
def _reference(latex: str) -> Any:
    return parse(latex)
