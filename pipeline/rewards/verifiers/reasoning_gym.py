"""The score that a reasoning-gym task gives."""

from __future__ import annotations

import json
from functools import lru_cache

from pipeline.rewards.answers import tagged_answer
from pipeline.types import Prompt

NONSENSE = ("", "nonsense, no answer at all")  # a scorer that gives 1 to these rewards anything
LIBRARY = "reasoning_gym"  # what its start-up time goes into importing


class Verifier:
    """The score of the reasoning-gym dataset that made the prompt, for the ``<answer>`` part or else the whole text.

    ``meta`` holds ``dataset`` (name), ``params`` (its configuration) and ``entry`` (question, answer, metadata).
    """

    def __init__(self) -> None:
        import reasoning_gym

        self._create = lru_cache(maxsize=64)(
            lambda name, params: reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(params))
        )

    @staticmethod
    def extract(text: str) -> str | None:
        """The ``<answer>`` part, else the whole text."""
        return tagged_answer(text) or None

    def refusal(self, prompt: Prompt) -> str:
        """Why the reference cannot be told from other answers by its scorer; "" where it can."""
        if missing := {"dataset", "params", "entry"} - set(prompt.meta):
            return f"meta lacks {', '.join(sorted(missing))}: it must hold dataset, params and entry"
        name = prompt.meta["dataset"]
        # Datasets with many right answers give none: their scorers read the metadata.
        if prompt.answer is not None and self._scored(prompt, str(prompt.answer)) != 1.0:
            return f"answer {prompt.answer!r} does not score 1 with the scorer of {name}"
        given = [wrong for wrong in NONSENSE if self._scored(prompt, wrong) == 1.0]
        return f"the scorer of {name} gives 1 to {given[0]!r}: choose another dataset" if given else ""

    def _scored(self, prompt: Prompt, text: str) -> float | None:
        """The score; None where the scorer raises, as many do on nonsense."""
        try:
            return self.score(prompt, text)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, SyntaxError):
            return None

    def score(self, prompt: Prompt, text: str) -> float:
        """Some datasets grant partial credit: a reward between 0 and 1 is not ``correct``."""
        dataset = self._create(prompt.meta["dataset"], json.dumps(prompt.meta["params"], sort_keys=True))
        return float(dataset.score_answer(tagged_answer(text), prompt.meta["entry"]))
