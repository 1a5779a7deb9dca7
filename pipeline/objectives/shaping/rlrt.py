"""RLRT: in correct responses, tokens that a policy who has seen another correct response would take less readily count
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from pipeline.config.schema import RunConfig
from pipeline.methods import shaping_method
from pipeline.objectives.tokens import Tokens
from pipeline.types import TrainBatch

METHOD = shaping_method(
    "rlrt",
    "2605.10781",
    "in correct responses A x (.5 + .5 clip(pi / pi_shown-a-peer, .8, 1.2)); mix, clip and prompt ours",
    evidence="third-party code",
)


def shape(tokens: Tokens, config: RunConfig, step: int) -> Tokens:
    """A <- A [(1 - mix) + mix clip(exp(sign(A) D), 1 - clip, 1 + clip)] in correct responses, D = log pi - log
    pi_teacher.

    arXiv 2605.10781 (third-party code read). The teacher is the same policy, shown a correct response to the same
    prompt first (``teacher_batch``). mix and clip are not given in what we read: 0.5 and 0.2, ours. Where there is no
    such peer, D = 0.
    """
    assert tokens.teacher is not None
    parameters = config.objective.rlrt
    gap = torch.where(tokens.correct, tokens.log_probs - tokens.teacher, 0.0)
    ratio = torch.exp(tokens.advantages.sign() * gap).clamp(1 - parameters.clip, 1 + parameters.clip)
    return replace(tokens, advantages=tokens.advantages * ((1 - parameters.mix) + parameters.mix * ratio))


def teacher_batch(batch: TrainBatch) -> tuple[TrainBatch, torch.Tensor] | None:
    """The correct main rows that have a peer, each behind its prompt and the peer's response, and which rows those are.

    The sequence is prompt, peer's response, prompt, response: a worked example first, in tokens, since what the
    paper's own prompt says is not public. The peer is the next correct response, cyclically, of the same prompt that
    differs. ``None``: nobody has one.
    """
    tokens = batch.tokens.split(batch.lengths.tolist())
    pairs = sorted(pair for group in _correct_rows(batch) for pair in _peers(tokens, group))
    if not pairs:
        return None
    masks = batch.loss_mask.split(batch.lengths.tolist())
    prompts = [int(mask.int().argmax()) for mask in masks]  # the first target begins the response
    parts = [(row[:start], row[start:]) for row, start in zip(tokens, prompts, strict=True)]
    sequences, kinds = [], []
    for row, peer in pairs:
        (prompt, response), (_, example) = parts[row], parts[peer]
        sequences.append(torch.cat([prompt, example, prompt, response]))
        kinds.append(F.pad(masks[row][prompts[row] :], (len(sequences[-1]) - len(response), 0)))
    rows = torch.tensor([row for row, _ in pairs])
    shown = TrainBatch(
        tokens=torch.cat(sequences),
        loss_mask=torch.cat(kinds),
        lengths=torch.tensor([len(sequence) for sequence in sequences]),
        targets=batch.targets[rows],
        weights=batch.weights[rows],
        advantages=batch.advantages[rows],
        auxiliary=batch.auxiliary[rows],
        correct=batch.correct[rows],
        temperatures=batch.temperatures[rows],
        behavior_log_probs=torch.zeros(int(batch.targets[rows].sum())),
    )
    return shown, rows


def _correct_rows(batch: TrainBatch) -> Sequence[list[int]]:
    """Rows of correct main responses, by prompt."""
    assert batch.groups is not None
    found: dict[int, list[int]] = {}
    for row in (batch.correct & ~batch.auxiliary).nonzero()[:, 0].tolist():
        found.setdefault(int(batch.groups[row]), []).append(row)
    return list(found.values())


def _peers(tokens: Sequence[torch.Tensor], rows: list[int]) -> list[tuple[int, int]]:
    """Each row with the next one that differs from it."""
    pairs = []
    for i, row in enumerate(rows):
        others = rows[i + 1 :] + rows[:i]
        peer = next((other for other in others if not torch.equal(tokens[other], tokens[row])), None)
        if peer is not None:
            pairs.append((row, peer))
    return pairs
