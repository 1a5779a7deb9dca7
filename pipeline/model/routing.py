"""Routes: which experts read each token, as engines record them and learners replay them.

Source: rollout routing replay, R3 (arXiv 2510.11370). The routes of a sample are an array ``[tokens - 1, expert layers,
top_k]`` of expert numbers, over the prompt and the response without its last token, which nothing reads: one entry for
every token whose logits predict another. Layers without experts have no entry. The order of the ``top_k`` experts means
nothing. An entry of zeros says that no choice is known, and the learner then makes its own: experts of one token
differ, so with a ``top_k`` of 2 or more no choice is all zeros.

An answer that a weight update interrupts is read again by the new weights before it goes on. The tokens that were read
before the update keep their routes, because their log-probs came with them; all others have the routes of the new
weights (``continued``). The routes of one token, over all layers, always come from one set of weights.
"""

from __future__ import annotations

import numpy as np

from pipeline.model.architecture import Architecture, Moe

_BYTE = 256  # experts that one byte can number


def number_type(moe: Moe) -> type[np.unsignedinteger]:
    """The type of an expert's number: one byte where that is enough, else two."""
    return np.uint8 if moe.experts <= _BYTE else np.uint16


def token_bytes(moe: Moe) -> int:
    """Bytes of the routes of one token."""
    return sum(moe.layers) * moe.top_k * np.dtype(number_type(moe)).itemsize


def of_all_layers(recorded: np.ndarray, model: Architecture) -> np.ndarray:
    """Routes from what an engine ``recorded`` of every layer, integers ``[tokens - 1, layers, top_k]``.

    Raises ``ValueError`` where that is another shape or no expert's number.
    """
    moe = model.moe
    if moe is None:
        raise ValueError(f"routes of a {model.family.name} model, which has no experts")
    if recorded.ndim != 3 or recorded.shape[1:] != (model.layers, moe.top_k):
        raise ValueError(f"routes of shape {recorded.shape}, not [tokens - 1, {model.layers}, {moe.top_k}]")
    taken = recorded[:, np.array(moe.layers)]
    if taken.size and not 0 <= taken.min() <= taken.max() < moe.experts:
        raise ValueError(f"routes name experts {taken.min()} to {taken.max()} of {moe.experts}")
    return taken.astype(number_type(moe))


def continued(before: np.ndarray | None, after: np.ndarray | None) -> np.ndarray | None:
    """The routes of an answer that went on under other weights.

    ``before``: of the tokens that were read until the interruption. ``after``: of all tokens, those read again first;
    None where it was interrupted again before that was known.
    """
    if before is None or after is None:
        return after if before is None else before
    return np.concatenate([before, after[len(before) :]])
