"""The score that a reasoning-gym task gives."""

from __future__ import annotations

import json
from functools import lru_cache

from pipeline.rewards.answers import tagged_answer
from pipeline.types import Prompt

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

    def score(self, prompt: Prompt, text: str) -> float:
        """Some datasets grant partial credit: a reward between 0 and 1 is not ``correct``."""
        dataset = self._create(prompt.meta["dataset"], json.dumps(prompt.meta["params"], sort_keys=True))
        return float(dataset.score_answer(tagged_answer(text), prompt.meta["entry"]))
