"""Turns verified samples into the rows of one update, with the whole normalisation in their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.config.schema import RunConfig
from pipeline.entropy.actuator import acting
from pipeline.objectives.advantage import group_advantages
from pipeline.objectives.temperature import check_temperatures
from pipeline.types import Actuation, ControlDecision, Prompt, Sample, SampleGroup, TrainBatch

DCPO_MAX_GAP = 0.1  # nats, of |H0 - H|


def build_batch(
    main: Sequence[SampleGroup],
    auxiliary: Sequence[SampleGroup],
    decision: ControlDecision,
    config: RunConfig,
    oldest: int | None = None,
) -> TrainBatch:
    """The rows of one update: every usable main sample, then the correct auxiliary ones.

    Tokens that weights older than version ``oldest`` drew carry no policy loss, and count in every denominator.

    Aborted and empty samples are left out everywhere, from the advantages of their group and from every denominator:
    nothing is known of them. Incorrect auxiliary samples give no row; ``entropy.positive_mean`` decides whether they
    count:

    - ``positives``: alpha / (tokens of all correct rows), so the push does not depend on the success rate;
    - ``samples``: alpha / G' / |o_i| with G' all auxiliary samples, SCOPE-RL's own (arXiv 2510.08141);
    - ``main``: alpha times what a main row of that length weighs (AEPO: positives are rows like others, advantage 1).

    ``reweight`` averages its positive term over the correct main rows in the same ways (``samples``: over all main rows
    that count).

    ``objective.overlong`` punishes or leaves out responses that came near the length limit or to it (DAPO, arXiv
    2503.14476, sections 3.4 and equation 13). Rows left out have weight 0 and count in no denominator;
    they are still measured.

    Raises:
        ValueError: no main sample can be trained on; a main sample not at T=1; a prompt without tokens.
    """
    check_temperatures([*main, *auxiliary])
    rows = _main_rows(main, config)
    if not rows:
        raise ValueError("no main sample has a finished, non-empty response: nothing to train on (engine aborted?)")
    main_lengths = np.array([row.sample.drawn_tokens for row in rows])
    main_correct = np.array([row.sample.correct for row in rows])
    kept = np.array([not (config.objective.overlong.filter and r.sample.finish_reason == "length") for r in rows])
    weights = np.where(kept, _mean_weights(main_lengths, main_lengths[kept], config), 0.0)
    actuation = _actuation(decision, config, float(main_correct.mean()))
    positive_weights = None
    if actuation.kind == "reweight" and main_correct[kept].any():
        counted = main_lengths[kept]
        positive_weights = torch.zeros(len(rows))
        each = _positive_weights(counted, main_correct[kept], counted, actuation.alpha, config)
        positive_weights[torch.from_numpy(kept)] = torch.from_numpy(each)
    if actuation.kind == "resample":
        drawn = [(g, group.prompt, s) for g, group in enumerate(auxiliary) for s in group.samples if usable(s)]
        lengths = np.array([sample.drawn_tokens for *_, sample in drawn], np.int64)
        correct = np.array([sample.correct for *_, sample in drawn], bool)
        if config.entropy.auxiliary_replaces:
            weights = _replaced(weights, int(correct.sum()))
        added = _positive_weights(lengths, correct, main_lengths[kept], actuation.alpha, config)[correct]
        weights = np.concatenate([weights, added])
        rows = rows + [_Row(prompt, s, 0.0, True, -1 - g) for g, prompt, s in drawn if s.correct]
    batch = _assemble(rows, weights, actuation, positive_weights)
    return batch if oldest is None else replace(batch, token_weights=_drawn_since(oldest, rows))


def rows_to_measure(samples: Sequence[tuple[Prompt, Sample]]) -> TrainBatch:
    """Rows that a learner is only asked about, in this order: they weigh nothing. Each must have a drawn token."""
    rows = [_Row(prompt, sample, 0.0, False, number) for number, (prompt, sample) in enumerate(samples)]
    return _assemble(rows, np.zeros(len(rows)), Actuation(), None)


def positives_consumed(batch: TrainBatch) -> int:
    """Correct rows through which the actuator acted in this batch, for the controller's "no positives" fallback.

    1 for the actuators that need none, so that nothing freezes.
    """
    kind = batch.actuation.kind
    if kind == "resample":
        return int(batch.auxiliary.sum())
    if kind in ("reweight", "fc", "dcpo", "tok"):
        return int((batch.correct & ~batch.auxiliary & (batch.weights > 0)).sum())
    return 1


@dataclass(frozen=True)
class _Row:
    prompt: Prompt
    sample: Sample
    advantage: float
    auxiliary: bool
    group: int


def usable(sample: Sample) -> bool:
    """Whether a sample can be a row: finished, and with at least one token that the model drew."""
    return sample.finish_reason != "abort" and sample.drawn_tokens > 0


def _actuation(decision: ControlDecision, config: RunConfig, accuracy: float) -> Actuation:
    actuator = acting(config.entropy)
    if actuator is None:
        return Actuation()
    alpha = config.entropy.alpha
    if actuator.name == "dcpo":
        alpha = _dcpo_share(abs(decision.target - decision.filtered_entropy), alpha, accuracy)
    return Actuation(actuator.name, decision.command, alpha)


def _dcpo_share(gap: float, alpha: float, accuracy: float) -> float:
    """DCPO's mixing share a / (1 + a), with a = alpha min(|H0 - H|, 0.1) / accuracy (arXiv 2601.12730, public code).

    0 without a reading, and where no sample is correct (there the published code divides by zero).
    """
    if not (gap >= 0 and accuracy > 0):
        return 0.0
    share = alpha * min(gap, DCPO_MAX_GAP) / accuracy
    return share / (1 + share)


def _main_rows(main: Sequence[SampleGroup], config: RunConfig) -> list[_Row]:
    kept = [[sample for sample in group.samples if usable(sample)] for group in main]
    rewards = [np.array([sample.reward - _overlong_penalty(sample, config) for sample in group]) for group in kept]
    correct = [np.array([sample.correct for sample in group], bool) for group in kept]
    advantages = group_advantages(rewards, correct, config.objective)
    return [
        _Row(group.prompt, sample, advantage, False, number)
        for number, (group, samples, own) in enumerate(zip(main, kept, advantages, strict=True))
        for sample, advantage in zip(samples, own.tolist(), strict=True)
    ]


def _overlong_penalty(sample: Sample, config: RunConfig) -> float:
    """Grows from 0 to ``overlong.penalty`` over the last ``overlong.buffer`` tokens before the limit."""
    overlong = config.objective.overlong
    if not overlong.buffer:
        return 0.0
    beyond = sample.drawn_tokens - (config.rollout.max_new_tokens - overlong.buffer)
    return overlong.penalty * max(0, beyond) / overlong.buffer


def _mean_weights(lengths: np.ndarray, over: np.ndarray, config: RunConfig) -> np.ndarray:
    """What rows of these lengths weigh in the configured mean over rows of lengths ``over``; float64.

    0 where ``over`` is empty.
    """
    if not len(over):
        return np.zeros(len(lengths))
    if config.objective.aggregation == "token_mean":
        return np.full(len(lengths), 1 / over.sum())
    if config.objective.aggregation == "sequence_mean":
        return 1 / (len(over) * lengths)
    return np.full(len(lengths), 1 / (len(over) * config.rollout.max_new_tokens))  # dr_grpo


def _positive_weights(
    lengths: np.ndarray, correct: np.ndarray, main: np.ndarray, alpha: float, config: RunConfig
) -> np.ndarray:
    """Float32 ``[rows]``, 0 on incorrect ones. ``main``: lengths of the main rows that count."""
    if config.entropy.positive_mean == "positives":
        each = np.full(len(lengths), 1 / max(1, lengths[correct].sum()))
    elif config.entropy.positive_mean == "samples":
        each = 1 / (len(lengths) * lengths)
    else:
        each = _mean_weights(lengths, main, config)
    return np.where(correct, alpha * each, 0.0).astype(np.float32)


def _replaced(weights: np.ndarray, count: int) -> np.ndarray:
    """``weights`` with 0 on ``count`` rows, spread evenly: dealt to mini-batches, each loses its share."""
    count = min(count, len(weights))
    weights = weights.copy()
    weights[np.arange(count) * len(weights) // max(1, count)] = 0.0
    return weights


def _assemble(
    rows: list[_Row], weights: np.ndarray, actuation: Actuation, positive_weights: torch.Tensor | None
) -> TrainBatch:
    """Lay the rows out, one behind the other."""
    prompts = {row.prompt.id: np.array(row.prompt.token_ids, np.int32) for row in rows}
    starts = np.array([len(prompts[row.prompt.id]) for row in rows], np.int64)
    for row in rows:
        if not row.prompt.token_ids and (row.sample.drawn is None or row.sample.drawn[0]):
            raise ValueError(f"prompt {row.prompt.id!r} has no tokens: its response would have no first prediction")
    responses = np.array([len(row.sample.token_ids) for row in rows], np.int64)
    parts = [part for row in rows for part in (prompts[row.prompt.id], row.sample.token_ids)]
    kinds = np.tile([False, True], len(rows))
    mask = np.repeat(kinds, np.stack([starts, responses], axis=1).ravel())
    for row, count, end in zip(rows, responses, (starts + responses).cumsum(), strict=True):
        if row.sample.drawn is not None:
            mask[end - count : end] = row.sample.drawn
    log_probs = [row.sample.of_drawn(row.sample.log_probs) for row in rows]
    return TrainBatch(
        tokens=torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind")),
        loss_mask=torch.from_numpy(mask),
        lengths=torch.from_numpy(starts + responses),
        targets=torch.tensor([row.sample.drawn_tokens for row in rows]),
        weights=torch.from_numpy(weights.astype(np.float32)),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        auxiliary=torch.tensor([row.auxiliary for row in rows]),
        correct=torch.tensor([row.sample.correct for row in rows]),
        temperatures=torch.tensor([row.sample.temperature for row in rows], dtype=torch.float32),
        behavior_log_probs=torch.from_numpy(np.concatenate(log_probs, dtype=np.float32)),
        actuation=actuation,
        groups=torch.tensor([row.group for row in rows]),
        positive_weights=positive_weights,
        routes=_routes(rows),
    )


def _drawn_since(oldest: int, rows: list[_Row]) -> torch.Tensor:
    """Float32 ``[targets]``, 1 where weights of version ``oldest`` or later drew the token, else 0."""
    parts = []
    for row in rows:
        recent = np.zeros(len(row.sample.token_ids), np.float32)
        for span in row.sample.weight_versions:
            recent[span.start : span.end] = span.version >= oldest
        parts.append(row.sample.of_drawn(recent))
    return torch.from_numpy(np.concatenate(parts))


def _routes(rows: list[_Row]) -> torch.Tensor | None:
    """The experts of every token, ``[tokens, expert layers, top_k]``; None where none of the samples has any."""
    if all(row.sample.routes is None for row in rows):
        return None
    parts = []
    for row in rows:
        inputs, routes = len(row.prompt.token_ids) + len(row.sample.token_ids) - 1, row.sample.routes
        if routes is None or len(routes) != inputs:
            found = "no routes" if routes is None else f"routes of {len(routes)}"
            raise ValueError(f"prompt {row.prompt.id!r}: a sample has {found} for the {inputs} tokens that were read")
        parts += [routes, np.zeros((1, *routes.shape[1:]), routes.dtype)]
    return torch.from_numpy(np.concatenate(parts))
