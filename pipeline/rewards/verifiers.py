"""The verifiers by name: what each reads in ``Prompt.answer`` and ``Prompt.meta``, and what it calls correct.

A name of the form ``module:attribute`` is a user's own function ``(prompt, text) -> float``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

from pipeline.data import DataError
from pipeline.rewards.answers import canonical_answer, tagged_answer
from pipeline.types import Prompt


class UnknownVerifierError(DataError):
    """No verifier has this name; the message gives the nearest one."""


class Verifier(Protocol):
    """Judges one response. May raise or hang: ``VerifierStage`` then marks the sample."""

    def score(self, prompt: Prompt, text: str) -> float:
        """Reward in [0, 1]; exactly 1 means correct."""


class ExactVerifier:
    """1 when the response equals ``answer`` (a string or number, or a list of accepted ones), up to white space."""

    def score(self, prompt: Prompt, text: str) -> float:
        """Linear in the text."""
        accepted = prompt.answer if isinstance(prompt.answer, list) else [prompt.answer]
        given = canonical_answer("exact", text)
        return float(any(given == canonical_answer("exact", str(answer)) for answer in accepted))


class CountdownVerifier:
    """1 when the response uses every digit of ``answer`` (``1234,24``) once and reaches its target, left to right.

    ``meta["operators"]`` holds the permitted operators, by default ``+-*``.
    """

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


class MathVerifier:
    r"""1 when math-verify finds the response mathematically equal to ``answer`` (LaTeX or plain, with or without ``$``).

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


class ChoiceVerifier:
    r"""1 when the letter that the response ends on is ``answer``: the last ``\boxed{}``, else what follows the last "answer is"."""

    def score(self, prompt: Prompt, text: str) -> float:
        """Linear in the text."""
        return float(canonical_answer("choice", text) == str(prompt.answer).strip().upper())


class ReasoningGymVerifier:
    """The score of the reasoning-gym dataset that made the prompt, for the ``<answer>`` part or else the whole text.

    ``meta`` holds ``dataset`` (name), ``params`` (its configuration) and ``entry`` (question, answer, metadata).
    """

    def __init__(self) -> None:
        import reasoning_gym

        self._create = lru_cache(maxsize=64)(
            lambda name, params: reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(params))
        )

    def score(self, prompt: Prompt, text: str) -> float:
        """Some datasets grant partial credit: a reward between 0 and 1 is not ``correct``."""
        dataset = self._create(prompt.meta["dataset"], json.dumps(prompt.meta["params"], sort_keys=True))
        return float(dataset.score_answer(tagged_answer(text), prompt.meta["entry"]))


class FunctionVerifier:
    """A user's own function."""

    def __init__(self, function: Callable[[Prompt, str], float]) -> None:
        self._function = function

    def score(self, prompt: Prompt, text: str) -> float:
        """Whatever the function says."""
        return float(self._function(prompt, text))


_VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "exact": ExactVerifier,
    "math": MathVerifier,
    "choice": ChoiceVerifier,
    "reasoning_gym": ReasoningGymVerifier,
    "countdown": CountdownVerifier,
}
# Time linear in the text and no foreign code: these need no process of their own to be safe.
INLINE = frozenset({"exact", "countdown", "choice"})
_LIBRARIES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}


def check_verifier(name: str) -> None:
    """Raise ``UnknownVerifierError`` unless ``name`` is registered, or is ``module:attribute`` with a findable module."""
    if name in _VERIFIERS:
        return
    module, colon, attribute = name.partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, _VERIFIERS, n=1, cutoff=0.0)[0]
        raise UnknownVerifierError(
            f"unknown verifier {name!r}: nearest is {nearest!r}; known: {', '.join(_VERIFIERS)}, "
            "or 'module:function' for your own"
        )
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found or not attribute.isidentifier():
        raise UnknownVerifierError(
            f"verifier {name!r}: module {module!r} is not importable or {attribute!r} is no name in it; "
            "it must read 'module:function' with the module on PYTHONPATH"
        )


@lru_cache(maxsize=64)
def make_verifier(name: str) -> Verifier:
    """The verifier called ``name``, its libraries loaded. Raises ``UnknownVerifierError``."""
    check_verifier(name)
    if name in _VERIFIERS:
        return _VERIFIERS[name]()
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute, None)
    if not callable(function):
        raise UnknownVerifierError(f"verifier {name!r}: module {module!r} has no function {attribute!r}")
    return FunctionVerifier(function)


def library_of(name: str) -> str:
    """The module that a verifier spends its start-up time importing."""
    return _LIBRARIES.get(name, name.partition(":")[0])
