"""The answer inside a response, in a form in which equal answers are equal strings (majority votes, distinct counts).

Text only, linear in its length: nothing here needs the verifier's own libraries or a timeout.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_SAID = re.compile(r"answer\s+is:?\s*(\S+)", re.IGNORECASE)
_LETTER = re.compile(r"(?:^|[^A-Za-z])([A-T])(?:$|[^A-Za-z])")
_LATEX_NOISE = re.compile(r"\s+|\$|\\left|\\right|\\[!,;]")


def canonical_answer(verifier: str, text: str) -> str:
    """What the response ``text`` answers, as ``verifier`` would read it."""
    if verifier == "math":
        return _math_answer(text)
    if verifier == "choice":
        return _chosen_letter(text)
    if verifier == "reasoning_gym":
        return tagged_answer(text)
    return " ".join(text.split())


def tagged_answer(text: str) -> str:
    """Content of the last ``<answer>...</answer>``; without such tags the whole text. Stripped."""
    close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(close, 0))
    return text[start + len("<answer>") : close].strip() if start >= 0 else text.strip()


def boxed_answer(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces, or None."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : position]
    return None


def _chosen_letter(text: str) -> str:
    """The capital letter in the last box, else after the last "answer is"; "" where there is none."""
    boxed = boxed_answer(text)
    said = [boxed] if boxed is not None else [match[1] for match in _SAID.finditer(text)][-1:]
    found = _LETTER.search(said[0]) if said else None
    return found[1] if found else ""


def _math_answer(text: str) -> str:
    """The boxed answer, else the last number, else the whole text; LaTeX spelling variants folded."""
    answer = boxed_answer(text)
    if answer is None:
        numbers = _NUMBER.findall(text)
        answer = numbers[-1].replace(",", "") if numbers else text
    answer = _LATEX_NOISE.sub("", answer).rstrip(".")
    return answer.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
