"""Countdown: an expression of the digits given that reaches the target."""

from __future__ import annotations

import re

from pipeline.types import Prompt

INLINE = True  # time linear in the text and no foreign code: it needs no process of its own


class Verifier:
    """1 when the response uses every digit of ``answer`` (``1234,24``) once and reaches its target, left to right.

    ``meta["operators"]`` holds the permitted operators, by default ``+-*``.
    """

    @staticmethod
    def extract(text: str) -> str | None:
        """The whole response."""
        return text or None

    def refusal(self, prompt: Prompt) -> str:
        """Why no response could match the reference; "" where one can."""
        if isinstance(prompt.answer, str) and re.fullmatch(r"[0-9]+,-?[0-9]+", prompt.answer):
            return ""
        return f"answer {prompt.answer!r} must read digits,target, like '1234,24'"

    def score(self, prompt: Prompt, text: str) -> float:
        """Linear in the text."""
        digits, target = prompt.answer.split(",")
        operators = prompt.meta.get("operators", "+-*")
        if len(text) != 2 * len(digits) - 1 or sorted(text[::2]) != sorted(digits):
            return 0.0
        value = int(text[0])
        for operator, digit in zip(text[1::2], text[2::2], strict=True):
            if operator not in operators:
                return 0.0
            operand = int(digit)
            value = value + operand if operator == "+" else value - operand if operator == "-" else value * operand
        return float(value == int(target))
