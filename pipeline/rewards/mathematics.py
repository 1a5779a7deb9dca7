"""Mathematics in ``plain_latex``: read whole, compared and ordered by math-verify (Hugging Face) and sympy.

Both are imported with the first call (a second). Nothing here bounds time: the caller does.
"""

from __future__ import annotations

import logging
import re
from functools import cache, lru_cache
from typing import Any

from pipeline.rewards.notation import words

_OTHER_BASE = re.compile(r"^\w+\s*_\s*(?:\d|\{\d+\})$")
_SLOW = re.compile(r"\^\{[^{}]*\d{4}|\^\{[^{}]*\^|\d{4,}\s*\)*!|!\s*\)*!")
_CANONICAL_LENGTH = 160  # characters
# For ``certainly_equal_to_itself``: stand-ins for a number above 0, and for any finite expression.
_POSITIVE, _FINITE = "\x01", "\x02"
_NUMBER = r"(?<![.\d])\d{1,12}(?:\.\d{1,12})?(?![.\d])"
_ATOM = rf"{_NUMBER}|[A-Za-z{_POSITIVE}{_FINITE}]|\\(?:pi|theta|alpha|beta)(?![A-Za-z])"
_PART = rf"(?:(?:{_ATOM})|[-+])"
_SUM = rf"{_PART}+"
_NOT_ZERO = rf"(?:[1-9]\d{{0,11}}(?:[a-z{_POSITIVE}]|\\pi)?|[a-z{_POSITIVE}]|\\pi)"
_POSITIVE_ROOT = re.compile(r"\\sqrt(?:\[[2-9]\])?\{[1-9]\d{0,11}\}")
_FINITE_ROOT = re.compile(rf"\\sqrt\{{{_SUM}\}}")
_FINITE_POWER = re.compile(r"(?<=[A-Za-z\d)])\^\{[1-9]\}")
_FINITE_FRACTION = re.compile(rf"\\frac\{{{_SUM}\}}\{{{_NOT_ZERO}\}}")
_MEMBERS = rf"(?:{_SUM}|-?\\infty)(?:,(?:{_SUM}|-?\\infty))*"
_INTERVAL = rf"[(\[]{_MEMBERS}[)\]]"
_MATRIX = rf"\\begin\{{([pbvB]?matrix)\}}(?:{_PART}|&|\\\\)+\\end\{{\1\}}"
_TEXT = r"\\text\{[A-Za-z0-9 ().,:'-]+\}"
_FINITE_TEXT = re.compile(
    rf"{_MATRIX}|{_TEXT}|{_MEMBERS}|{_INTERVAL}(?:\\cup{_INTERVAL})*|\\\{{{_MEMBERS}\\\}}|(?:{_PART}|[()])+(?:\\%)?"
)


def parse(latex: str) -> Any:
    """Words in lower case, a sympy object for what math-verify reads, else ``latex`` without spaces."""
    said = words(latex)
    if said is not None:
        return said
    if _OTHER_BASE.match(latex):  # math-verify drops the base
        return re.sub(r"[{} ]", "", latex)
    library, spelling = _library()
    found = library.parse(f"${latex}$", spelling, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else latex.replace(" ", "")


def certainly_equal_to_itself(latex: str) -> bool:
    r"""Whether ``parse`` is known, without its library, to give something that equals itself.

    Words do. So does what sums, products and small powers of numbers, letters and roots make, in tuples, intervals or
    alone, as long as nothing is divided by what could be 0: sympy then has a finite value, and what math-verify cannot
    read stays text. Innermost roots, powers and fractions are struck out until none is left.
    """
    if words(latex) is not None:
        return True
    if len(latex) > _CANONICAL_LENGTH:
        return False
    text, before = latex.replace(" ", ""), ""
    while text != before:
        before = text
        text = _POSITIVE_ROOT.sub(_POSITIVE, text)
        text = _FINITE_POWER.sub("", _FINITE_ROOT.sub(_FINITE, _FINITE_FRACTION.sub(_FINITE, text)))
    return bool(_FINITE_TEXT.fullmatch(text))


def equal(gold: Any, answer: Any) -> bool:
    """Whether math-verify takes what ``parse`` made of a reference and of an answer for equal."""
    if isinstance(gold, str) or isinstance(answer, str):
        return bool(gold == answer)
    library, _ = _library()
    return bool(library.verify(*_scaled(gold, answer), timeout_seconds=None))


@lru_cache(maxsize=65536)
def canonical(latex: str) -> str:
    """Equal strings for answers that sympy orders or evaluates alike; ``latex`` itself where that could take long."""
    as_spelt = latex.replace(" ", "")
    if len(latex) > _CANONICAL_LENGTH or _SLOW.search(latex):
        return as_spelt
    parsed = parse(latex)
    if isinstance(parsed, str):
        return parsed
    from sympy import Float, nsimplify

    try:
        exact = {number: nsimplify(number, rational=True) for number in parsed.atoms(Float)}
        evaluated = str(parsed.xreplace(exact).doit())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return as_spelt
    return as_spelt if evaluated in ("True", "False") else evaluated


@cache
def _library() -> tuple[Any, Any]:
    """math-verify, and how it reads LaTeX: all of it, without boxes of its own."""
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    # It warns that its own time limits are off; the caller's are on.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Its units would take the t of 2t for one; ``plain_latex`` has taken units away.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return math_verify, (math_verify.LatexExtractionConfig(boxed_match_priority=-1, normalization_config=spelling),)


def _scaled(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Both times the power of ten that brings a small ``gold`` near 1: math-verify compares six decimal places."""
    if getattr(gold, "is_number", False) and getattr(answer, "is_number", False) and gold.is_real and gold != 0:
        import sympy

        size = abs(gold.evalf(3))
        if 0 < size < 1e-3:  # 0: of a sum or product that sympy left unevaluated
            factor = sympy.Integer(10) ** -int(sympy.floor(sympy.log(size, 10)))
            return gold * factor, answer * factor
    return gold, answer
