r"""The answer inside a response: where it stands, and a form in which equal answers are equal strings.

Text only, linear in its length: nothing here needs the verifier's own libraries or a timeout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from pipeline.rewards.mathematics import canonical
from pipeline.rewards.notation import plain_latex, rational, words

_NUMBER = r"[-\u2212]?[$€£]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?"
_LAST_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}")
_SAID = re.compile(r"answer\s+is\s*:?\s*(?:\*\*)?\s*(\S[^\n]*)", re.IGNORECASE)
_LINE = re.compile(r"^[\s>#*_-]*(?:the\s+)?(?:final\s+)?answer[*_ \t]*:[*_]*[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\[{}\\]|[{}]")
_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_MATH = re.compile(r"^\$\$?([^$]+)\$|^\\\((.+?)\\\)|^\\\[(.+?)\\\]")
_SENTENCE_END = re.compile(r"[.!?](?:\s|\*|$)|,\s|\s(?:because|since|so|as|which|where)\s", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(r"[+-]?\d*\.?\d+(?:[eE][+-]?\d{1,3})?")
_LETTER = re.compile(r"(?:^|[^A-Za-z])([A-T])(?:$|[^A-Za-z])")
_ONLY_LETTER = re.compile(r"^\s*[*$\\]*(?:text\w*\{)?\s*[*(\[]*\s*([A-Ta-t])\s*[)\].:*}$]*\s*$")
_CHOSEN = re.compile(r"answer\s+is\s*:?\s*(?:option|choice|letter)?\s*(\S+)", re.IGNORECASE)
_REFERENCE = "equal to the reference"
_ASSIGNMENT = re.compile(r"^\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?\s*=\s*([^=<>]+)$")


def canonical_answer(verifier: str, text: str) -> str:
    """What the response ``text`` answers, as ``verifier`` would read it: answers it takes for equal are one string,
    where numbers or words are answered. Other mathematics is compared as it is spelt.
    """
    if verifier == "math":
        return _math_answer(text)
    if verifier == "choice":
        return chosen_letter(text)
    if verifier == "reasoning_gym":
        return tagged_answer(text)
    if verifier == "exact":
        return number_or_text(text)
    return " ".join(text.split())


def tagged_answer(text: str) -> str:
    """Content of the last ``<answer>...</answer>``; without such tags the whole text. Stripped."""
    close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(close, 0))
    return text[start + len("<answer>") : close].strip() if start >= 0 else text.strip()


def number_or_text(text: str) -> str:
    """The text with single spaces; a number as its shortest decimal or fraction (``12.0`` is ``12``)."""
    stripped = " ".join(text.split())
    return str(Fraction(stripped)) if _PLAIN_NUMBER.fullmatch(stripped) else stripped


def final_answer(text: str) -> str | None:
    r"""The answer that a response commits itself to, as it is written there; None where there is none.

    Only what follows the last ``</think>`` counts; thinking that never ends has no answer. There, in this order:

    1. What ends last of ``\boxed{...}`` (also ``\fbox``, with spaces before the brace), ``<answer>...</answer>`` and a
      line
       ``Answer: ...``. So a last line "Answer: 34" beats an earlier box. A box inside the other two is opened.
       When the last box is not closed, the response was cut: it has no answer.
    2. What follows the last "answer is", up to the end of the sentence.
    3. The last ``$...$`` or number.
    """
    thought = after_thinking(text)
    if thought is None:
        return None
    text = thought
    boxes, open_box = _boxes(text)
    marked = [*boxes, *((m.end(), m[1]) for m in _TAGS.finditer(text)), *_answer_lines(text)]
    if open_box is not None and all(end <= open_box for end, _ in marked):
        return None
    if marked:
        content = max(marked)[1]
        inside, open_box = _boxes(content)
        if open_box is not None:
            return None
        return (inside[-1][1] if inside else content).strip() or None
    said = [match[1] for match in _SAID.finditer(text)][-1:]
    return (_stated(said[0]) if said else None) or _last_expression(text)


def after_thinking(text: str) -> str | None:
    """What follows the last ``</think>``; None while a ``<think>`` is still open."""
    head, closed, tail = text.rpartition("</think>")
    if "<think>" in tail:
        return None
    return tail if closed else head + tail


def _boxes(text: str) -> tuple[list[tuple[int, str]], int | None]:
    """(end, content) of every closed box, outermost only, and where the first box starts that is never closed."""
    boxes: list[tuple[int, str]] = []
    start = _BOX.search(text)
    while start is not None:
        found = _braced(text, start.end())
        if found is None:
            return boxes, start.start()
        boxes.append(found)
        start = _BOX.search(text, found[0])
    return boxes, None


def _braced(text: str, start: int) -> tuple[int, str] | None:
    r"""(end, content) of the group at ``start``: ``{...}``, ``\text{...}``, or like ``42`` up to a space; None
    if open.
    """
    bare = re.compile(r"(?:\\[A-Za-z]+\s*)?(?=\{)|[^\s${}]+").match(text, start)
    if bare is None:
        return None
    if not text.startswith("{", bare.end()):
        return bare.end(), bare[0].rstrip(".")
    depth = 0
    for brace in _BRACES.finditer(text, bare.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            content = text[bare.end() + 1 : brace.start()]
            return brace.end(), f"{bare[0]}{{{content}}}" if bare[0] else content
    return None


def _answer_lines(text: str) -> Iterator[tuple[int, str]]:
    """(end, content) of the lines ``Answer: ...``; an empty one has the next line's content."""
    for match in _LINE.finditer(text):
        content, end = match[1].strip(), match.end()
        if not content.strip("*_ "):
            following = re.compile(r"\s*([^\n]*)").match(text, end)
            content, end = (following[1], following.end()) if following else ("", end)
        content = content.strip().strip("*_").strip()
        delimited = _MATH.match(content)
        yield end, next(filter(None, delimited.groups())) if delimited else content


def _stated(sentence: str) -> str | None:
    """The answer at the start of ``sentence``; None where that is neither mathematics nor a number."""
    delimited = _MATH.match(sentence)
    if delimited:
        return next(filter(None, delimited.groups())).strip()
    end = _SENTENCE_END.search(sentence)
    stated = (sentence[: end.start()] if end else sentence).strip().strip("*_").strip()
    if re.match(r"[-+(\[{\\$€£.\d\u2212]", stated) or re.fullmatch(r"\\?[A-Za-z]\w*\s*=.*|[A-Za-z]+", stated):
        return stated
    return None


def _last_expression(text: str) -> str | None:
    spans = re.compile(r"\$\$?([^$]{1,400})\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL)
    found = [(m.end(), next(filter(None, m.groups())).strip()) for m in spans.finditer(text)]
    if len(text) <= 400 and not re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", text)):
        return text.strip() or None  # nothing but mathematics
    found += [(m.end(), m[0]) for m in _LAST_NUMBER.finditer(text)]
    return max(found)[1] if found else None


def chosen_letter(text: str) -> str:
    """The letter that ``final_answer`` finds by its marks, else the capital after the last "answer is", else the letter
    that is all of the text; "" where there is none.
    """
    tail = after_thinking(text)
    if tail is None:
        return ""
    marked = bool(_BOX.search(tail) or _TAGS.search(tail) or _LINE.search(tail))
    said = [match[1] for match in _CHOSEN.finditer(tail)][-1:]
    if not marked and not said:
        return only_letter(tail)
    answer = (final_answer(tail) or "") if marked else said[0]
    found = _LETTER.search(answer)
    return found[1] if found else only_letter(answer) if marked else ""


def only_letter(text: str) -> str:
    r"""The letter A to T, in capitals, that ``text`` consists of: ``B``, ``b``, ``(B)``, ``B.``, ``\text{(B)}``; else
    "".
    """
    found = _ONLY_LETTER.match(text)
    return found[1].upper() if found else ""


def grouped_answers(verifier: str, texts: Sequence[str], correct: Sequence[bool]) -> list[str]:
    """One string a response, equal where the verifier takes the answers for equal.

    Mathematics that equals the reference is one answer, however it is written; the verifier has found that already.
    """
    return [
        _REFERENCE if right and verifier == "math" else canonical_answer(verifier, text)
        for text, right in zip(texts, correct, strict=True)
    ]


def _math_answer(text: str) -> str:
    answer = final_answer(text)
    if answer is None:
        return ""
    latex = plain_latex(answer)
    assigned = _ASSIGNMENT.match(latex)
    latex = plain_latex(assigned[1]) if assigned else latex
    value, said = rational(latex.replace(r"\%", "")), words(latex)
    if value is not None:
        return str(value / 100 if r"\%" in latex else value)
    return said if said is not None else canonical(latex)
