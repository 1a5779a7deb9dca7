r"""One notation for mathematical answers: numbers, units and powers written in many ways become plain LaTeX.

Text only, linear in its length. What is equal (``2x+1`` and ``1+2x``) math-verify decides; here only spellings are
folded.
"""

from __future__ import annotations

import re
from fractions import Fraction

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u3000\t\n\r", " "),
        **dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u200b\ufeff", ""),
        **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∪": r"\cup "},  # noqa: RUF001
        **{"π": r"\pi ", "∞": r"\infty "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}"},
        **{"¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "√": r"\sqrt", "θ": r"\theta ", "∅": r"\emptyset "},
        **dict.fromkeys("€£¥₹₽₩¢", ""),
    }
)
_DELIMITERS = re.compile(
    r"\\\$|\$|\\[()](?!\\)|(?<!\\)\\[\[\]]|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\*\*$|^\*\*"
)
_SPACES = re.compile(r"(?<!\\)\\[ ,;:]|~|\\q?quad(?![a-z])|\\thinspace|\\hspace\{[^{}]*\}")
_NO_SPACE = re.compile(r"(?<!\\)\\!\s*")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])")
_PERCENT = re.compile(r"(?<!\\)%|\\?\s*\b(?:percent|percentage|pct)\b|\\text\s*\{\s*(?:percent|\\?%)\s*\}")
_MONEY = r"(?:dollars?|USD|US|EUR|euros?|GBP|pounds?|cents?|rupees?|yen|Rs\.?|INR|JPY|CNY|yuan)"
_MONEY_BEFORE = re.compile(rf"^(?:{_MONEY}|\\text\s*\{{\s*{_MONEY}\s*\}}|\\(?:euro|pounds|yen)\b)\s*(?=-?[\d.])")
_MONEY_COMMAND = re.compile(r"\\(?:euro|pounds|yen|textdollar|texteuro|textsterling)(?![a-z])(?:\{\})?")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+|(?: \d{3})+|(?:'\d{3})+)(?!\d|[,']\d)")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\\d.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\dA-Za-z.])")
_TIMES_TEN = re.compile(
    r"(?:(?<![\d.A-Za-z\\^_{])(\d+\.?\d*|\.\d+)\s*(?:\\times|\\cdot|\*)\s*"
    r"|(?<![\d.A-Za-z)}*^_\\/])(?<!\\times )(?<!\\cdot ))"
    r"10\s*\^\s*\{\s*([+-]?\d+)\s*\}(?!\s*[\^!])"
)
_BARE_FRACTION = re.compile(r"\\frac\s*(?:(\d)|(\{\w+\}))\s*(?:(\d)|(\{\w+\}))")
_BARE_ROOT = re.compile(r"\\sqrt\s*(\d)")
_UPRIGHT = re.compile(r"\\(?:mathrm|mathit)\s*\{([A-Za-z])\}")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot|overbar)\s*(?:\{\s*(\d+)\s*\}|(\d))")
_MIXED = re.compile(r"(?<![\d.}A-Za-z^_/])(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_MIXED_PLAIN = re.compile(r"(?<![\d./^])(\d+)(?: +|-)(?<!\d-)(\d+)/(\d+)(?![\d/])")
_TEXT_COMMAND = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|bb)?|mbox|hbox|operatorname)"
_TEXT_UNIT = re.compile(rf"(?<=[\d\w}})\s])\s*{_TEXT_COMMAND}\s*\{{([^{{}}]*)\}}(?:\s*\^\s*(?:\d|\{{-?\d\}}))?\.?$")
_WHOLE_TEXT = re.compile(rf"^{_TEXT_COMMAND}\s*\{{([^{{}}]*)\}}$")
# After a number: a measure with or without a space, any other word only after a space.
_SHORT_UNITS = (
    "km/h|km/hr|m/s|mph|kmph|cm|mm|km|dm|nm|kg|mg|ml|mL|ft|lbs?|oz|hrs?|mins?|secs?|sq|cu|yd|yrs?|kWh|kW|Hz|kHz|MHz|eV|"
    "rpm|px|GB|MB|kB|rad|deg|dollars?|USD|EUR|GBP|euros?|cents?"
)
_UNITS = re.compile(
    rf"^(?P<number>.*[\d}}])(?:\s*(?:{_SHORT_UNITS})(?![A-Za-z])| +(?:[mgshLNJWVKCF]|[A-Za-z]{{2,}})(?![A-Za-z]))"
    r"(?:[ /.-]*(?:[A-Za-z]+))*(?:\s*\^\s*(?:\d|\{-?\d\}))?\.?$"
)
_NO_UNIT = re.compile(
    r"\b(?:pi|sqrt|sin|cos|tan|cot|sec|csc|arc\w+|log|ln|exp|and|or|to|inf|infinity|mod|choose|over|times|plus|minus"
    r"|divided|if|for|when|where|is|are|am|pm|a\.m|p\.m|AM|PM|x|y|z|n|i|e|theta|alpha|beta|degrees? ?[CF])\b"
)
_DEGREE_WORD = re.compile(r"(?<=[\d}])\s*(?:\\text\s*\{)?\s*degrees?\b\s*\}?$")
_POWER = re.compile(r"\^\s*(-?\d+(?:\.\d+)?)(?![\d}])")
_INTEGER_OR_DECIMAL = re.compile(r"^[+-]?\d*\.?\d+\.?$")
_RATIO = re.compile(r"^([+-]?)(?:\\frac\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|([+-]?\d+)\s*/\s*(\d+))$")
_WORDS = re.compile(r"^[A-Za-z][A-Za-z\s.,;:'-]*$")
_NO_WORDS = re.compile(r"\b(?:pi|sin|cos|tan|log|exp|sqrt|inf|infinity|and|or|alpha|beta|theta)\b")
_LONGEST_EXPONENT = 400  # digits that an exponent may write out; beyond, a power of ten stays one


def plain_latex(answer: str) -> str:
    r"""``answer`` without delimiters, currency, units and separators; powers braced, ``1e-5`` and ``0.\overline{3}``
    written out. "" where nothing is left.
    """
    text = answer.strip().translate(_CHARACTERS)
    text = _NO_SPACE.sub("", text).replace("{,}", ",")
    text = _MONEY_COMMAND.sub("", _SPACES.sub(" ", _DELIMITERS.sub("", text)))
    text = _FRACTION.sub(r"\\frac", text).strip()
    text = re.sub(r"\s+", " ", text).rstrip(".;,: ") if not text.endswith("...") else text
    text = _PERCENT.sub(r"\\%", _DEGREES.sub("", text)).strip()
    text = _without_unit(_MONEY_BEFORE.sub("", text))
    text = _thousands_joined(text.replace("**", "^"))
    text = _SCIENTIFIC.sub(_written_out, _REPEATING.sub(_as_fraction, text))
    text = _MIXED.sub(lambda m: rf"({m[1]}+\frac{{{m[2] or m[3]}}}{{{m[4] or m[5]}}})", text)
    text = _MIXED_PLAIN.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _BARE_FRACTION.sub(lambda m: rf"\frac{_braced(m[1] or m[2])}{_braced(m[3] or m[4])}", text)
    text = _UPRIGHT.sub(r"\1", _BARE_ROOT.sub(r"\\sqrt{\1}", text))
    text = _POWER.sub(r"^{\1}", _braced_powers(text))
    return _TIMES_TEN.sub(lambda m: _written_out(m, m[1] or "1"), text).strip()


def words(latex: str) -> str | None:
    r"""The words of an answer that is text and no mathematics (``\text{Tuesday}``, ``yes``), in lower case;
    else None.
    """
    boxed = _WHOLE_TEXT.match(latex)
    text = (boxed[1] if boxed else latex).strip()
    is_text = _WORDS.match(text) and not _NO_WORDS.search(text) and (boxed or re.search("[A-Za-z]{3}|^[Nn]o$", text))
    return re.sub(r"[\s.,;:'-]+", " ", text).strip().casefold() if is_text else None


def rational(latex: str) -> Fraction | None:
    r"""The number that ``plain_latex`` left, where it is an integer, a decimal or one fraction; else None."""
    text = latex.replace(" ", "")
    if text.startswith("(") and text.endswith(")") and "," not in text and "+" in text:  # a mixed number
        whole, _, part = text[1:-1].partition("+")
        parts = rational(whole), rational(part)
        return None if None in parts else parts[0] + parts[1]  # type: ignore[operator]
    if text.startswith("-("):
        value = rational(text[1:])
        return None if value is None else -value
    if len(text) > 2 * _LONGEST_EXPONENT:
        return None
    if _INTEGER_OR_DECIMAL.match(text):
        return Fraction(text.rstrip("."))
    ratio = _RATIO.match(text)
    if not ratio:
        return None
    over, under = int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5])
    return None if under == 0 else Fraction(over, under) * (-1 if ratio[1] == "-" else 1)


def _without_unit(text: str) -> str:
    whole = _WHOLE_TEXT.match(text)
    if whole:
        inner = whole[1].strip()
        return _without_unit(inner) if re.match(r"[-+.\d]", inner) else text
    text = _DEGREE_WORD.sub("", text)
    unit = _TEXT_UNIT.search(text)
    if unit and not _NO_UNIT.search(unit[1]) and text[: unit.start()].strip():
        return text[: unit.start()].strip()
    found = _UNITS.match(text)
    if found and not _NO_UNIT.search(text[found.end("number") :]) and not re.search(r"[A-Za-z]{3,} ", found["number"]):
        return found["number"].strip()
    return text


def _thousands_joined(text: str) -> str:
    """Without thousands separators. Inside brackets a comma separates members, unless others do so with a space."""
    if re.search(r"[(\[{]\s*-?\d{1,3}(?:,\s*-?\d+)+\s*\\?[)\]}]", text) and not re.search(r", ", text):
        return text
    return _THOUSANDS.sub(lambda m: m[1] + re.sub("[ ,']", "", m[2]), text)


def _braced(group: str) -> str:
    return group if group.startswith("{") else f"{{{group}}}"


def _written_out(match: re.Match[str], digits: str = "") -> str:
    """A number in scientific notation as a decimal."""
    digits, exponent = digits or match[1], int(match[2][:12])
    if abs(exponent) > _LONGEST_EXPONENT:
        return rf"{digits} \cdot 10^{{{exponent}}}"
    whole, _, part = digits.partition(".")
    point = len(whole) + exponent
    figures = whole + part
    if point <= 0:
        return "0." + "0" * -point + figures
    figures = figures.ljust(point, "0")
    return (figures[:point] + "." + figures[point:]).rstrip(".")


def _as_fraction(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, fixed, repeated = match[1] or "0", match[2], match[3] or match[4]
    value = Fraction(int(whole + fixed + repeated) - int(whole + fixed), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _braced_powers(text: str) -> str:
    """``x^(a+(b))`` as ``x^{a+(b)}``."""
    position = text.find("^(")
    while position >= 0:
        depth = 0
        for end in range(position + 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                text = text[: position + 1] + "{" + text[position + 2 : end] + "}" + text[end + 1 :]
                break
        position = text.find("^(", position + 1)
    return text
