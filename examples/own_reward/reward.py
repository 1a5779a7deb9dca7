"""A reward of one's own: half for an expression that is right with other digits, all for the right one."""

import re

from pipeline.types import Prompt


def score(prompt: Prompt, text: str) -> float:
    """``prompt.answer`` is what the JSONL line has, here "1234,10": digits, then the sum to be reached."""
    digits, _, target = prompt.answer.partition(",")
    found = re.fullmatch(r"(\d)([+-]\d){3}", text)
    if found is None or sum(int(term) for term in re.findall(r"[+-]?\d", text)) != int(target):
        return 0.0
    return 1.0 if sorted(re.findall(r"\d", text)) == sorted(digits) else 0.5
