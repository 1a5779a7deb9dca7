"""The order in which prompts are trained on, and its exact resumable state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.data import DataError
from pipeline.seeds import stream_seed
from pipeline.types import Prompt


class _State(msgspec.Struct):
    """A place in the order."""

    seed: int
    epoch: Annotated[int, Meta(ge=0, lt=2**31)]
    position: Annotated[int, Meta(ge=0)]  # prompts taken of the epoch
    deferred: list[int]  # prompts that go last in the epoch
    prompts: int
    fingerprint: str


class DataCursor:
    """Epochs without replacement, each shuffled or in the order of the prompts; a pure function of the prompts, the
    seed and how much was taken.

    One ``take`` never holds a prompt twice, not even across the end of an epoch: the sampling seeds derive from the
    prompt, so a repetition would draw the same responses again.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, *, shuffled: bool = True) -> None:
        if not prompts:
            raise DataError("there are no prompts to train on")
        self._prompts = prompts
        self._seed = seed
        self._shuffled = shuffled
        self._fingerprint = fingerprint(prompts) + ("" if shuffled else " in order")
        self._order: list[int] = []
        self._position = 0
        self._begin_epoch(0, [])

    @property
    def epoch(self) -> int:
        """Epochs completed so far, in whole."""
        return self._epoch

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts. Raises ``DataError`` when there are fewer than ``n`` in all."""
        if n > len(self._prompts):
            raise DataError(
                f"rollout.prompts_per_step={n} exceeds the {len(self._prompts)} training prompts: "
                "lower it or add prompts (a step never holds a prompt twice)"
            )
        taken = self._order[self._position : self._position + n]
        self._position += len(taken)
        if len(taken) < n:
            self._begin_epoch(self._epoch + 1, taken)
            self._position = n - len(taken)
            taken = taken + self._order[: self._position]
        return [self._prompts[index] for index in taken]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; ``load_state_dict`` continues exactly from it."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "deferred": list(self._deferred),
            "prompts": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a saved state belongs to these prompts and this seed."""
        return bool(state.get("fingerprint") == self._fingerprint and state.get("seed") == self._seed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises ``DataError`` when it was saved on other prompts or with another seed.
        Raises ``ValueError`` for a place that these prompts do not have.
        """
        saved = msgspec.convert(state, _State)
        if saved.fingerprint != self._fingerprint:
            raise DataError(
                f"the checkpoint was trained on {state['prompts']} prompts with fingerprint {state['fingerprint']}, "
                f"this run has {len(self._prompts)} with fingerprint {self._fingerprint}: resume with the same data "
                "(source, held_out, order, chat template, tokenizer and rollout.max_prompt_tokens), start a new run, "
                "or say --allow-change"
            )
        if saved.seed != self._seed:
            raise DataError(
                f"the checkpoint's data order has seed {state['seed']}, this run has seed={self._seed}: resume with "
                "the same"
            )
        if saved.position > len(self._prompts):
            raise ValueError(f"cursor.position is {state['position']}, there are {len(self._prompts)} prompts")
        self._begin_epoch(saved.epoch, saved.deferred)
        self._position = saved.position

    def _begin_epoch(self, epoch: int, deferred: list[int]) -> None:
        """Order an epoch; ``deferred`` prompts were taken for the batch it begins in, so they go last."""
        order = list(range(len(self._prompts)))
        if self._shuffled:
            rng = np.random.default_rng([stream_seed(self._seed, "data"), epoch])
            order = rng.permutation(len(self._prompts)).tolist()
        late = set(deferred)
        self._order = [index for index in order if index not in late] + [index for index in order if index in late]
        self._epoch, self._position, self._deferred = epoch, 0, deferred


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """16 hex digits over the ids and token ids of the prompts, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(f"{prompt.id!r}{prompt.token_ids}".encode())
    return digest.hexdigest()
