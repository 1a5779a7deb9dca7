"""Mathematical equality, as math-verify (a library of Hugging Face) finds it."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.types import Prompt

LIBRARY = "math_verify"  # what its start-up time goes into importing


class Verifier:
    r"""1 when math-verify finds the response mathematically equal to ``answer`` (LaTeX or plain, with or without
    ``$``).

    The answer is read from the last ``\boxed{}`` or, failing that, the last expression of the response.
    """

    def __init__(self) -> None:
        import math_verify

        logging.getLogger("math_verify").setLevel(
            logging.ERROR
        )  # it warns that its own time limits are off; ours are on
        self._library = math_verify

    def score(self, prompt: Prompt, text: str) -> float:
        """Raises ``ValueError`` when the reference answer is not mathematics. Time is bounded by the caller only."""
        # Undelimited LaTeX would be read in part: 3\sqrt{2} as 3.
        answer = str(prompt.answer)
        gold = (self._parse(f"${answer}$") if "$" not in answer else []) or self._parse(answer)
        if not gold:
            raise ValueError(f"answer {prompt.answer!r} is no mathematical expression")
        return float(self._library.verify(gold, self._parse(text), timeout_seconds=None))

    def _parse(self, text: str) -> list[Any]:
        return self._library.parse(text, parsing_timeout=None)
