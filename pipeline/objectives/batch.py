"""From verified samples to the rows of one update, with the whole normalisation in their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.config.schema import ObjectiveConfig, RunConfig
from pipeline.entropy.actuators import acting
from pipeline.objectives.advantages import group_advantages
from pipeline.objectives.temperature import check_temperatures
from pipeline.types import Actuation, ControlDecision, Prompt, Sample, SampleGroup, TrainBatch


def build_batch(
    main: Sequence[SampleGroup],
    auxiliary: Sequence[SampleGroup],
    decision: ControlDecision,
    config: RunConfig,
    pad_token_id: int,
) -> TrainBatch:
    """The rows of one update: every usable main sample, then the correct auxiliary ones.

    Aborted and empty samples are left out everywhere, from the advantages of their group and from every denominator:
    nothing is known of them. Incorrect auxiliary samples give no row; ``entropy.positive_mean`` decides whether they count:

    - ``positives``: alpha / (tokens of all correct rows), so the push does not depend on the success rate;
    - ``samples``: alpha / G' / |o_i| with G' all auxiliary samples, SCOPE-RL's own (arXiv 2510.08141).

    ``reweight`` averages its positive term over the correct main rows (over all main rows) in the same two ways.

    Raises:
        ValueError: no main sample can be trained on; a main sample not at T=1; a prompt without tokens.
    """
    check_temperatures([*main, *auxiliary])
    actuation = _actuation(decision, config)
    rows = _main_rows(main, config.objective)
    if not rows:
        raise ValueError("no main sample has a finished, non-empty response: nothing to train on (engine aborted?)")
    main_lengths = np.array([len(row.sample.token_ids) for row in rows])
    main_correct = np.array([row.sample.correct for row in rows])
    weights = _main_weights(main_lengths, config)
    mean = config.entropy.positive_mean
    positive_weights = None
    if actuation.kind == "reweight" and main_correct.any():
        positive_weights = torch.from_numpy(_positive_weights(main_lengths, main_correct, actuation.alpha, mean))
    if actuation.kind == "resample":
        drawn = [(group.prompt, s) for group in auxiliary for s in group.samples if _usable(s)]
        lengths = np.array([len(sample.token_ids) for _, sample in drawn], np.int64)
        correct = np.array([sample.correct for _, sample in drawn], bool)
        weights = np.concatenate([weights, _positive_weights(lengths, correct, actuation.alpha, mean)[correct]])
        rows = rows + [_Row(prompt, sample, 0.0, True) for prompt, sample in drawn if sample.correct]
    return _assemble(rows, weights, pad_token_id, actuation, positive_weights)


def positives_consumed(batch: TrainBatch) -> int:
    """Correct rows through which the actuator acted in this batch, for the controller's "no positives" fallback.

    1 for the actuators that need none, so that nothing freezes.
    """
    kind = batch.actuation.kind
    if kind == "resample":
        return int(batch.auxiliary.sum())
    if kind in ("reweight", "fc", "tok"):
        return int((batch.correct & ~batch.auxiliary).sum())
    return 1


def needs_log_probs(config: RunConfig, batch: TrainBatch) -> bool:
    """Whether ``batch`` needs the policy's log-probs before its first update: for the ratio, or for the covariance."""
    return config.learner.updates_per_step > 1 or _detaches(batch.actuation)


def with_clip_cov(batch: TrainBatch, log_probs: torch.Tensor) -> TrainBatch:
    """Detach the main tokens of highest covariance: ``token_weights`` 0 on the top fraction ``actuation.command``.

    Cov_i = (log pi_i - mean)(A_i - mean), means and ranking over the whole batch (arXiv 2505.22617, section 4). Unlike the
    paper's Clip-Cov, which draws at random among tokens of covariance 1 to 5, this takes the top ones, as its KL-Cov
    does: the fraction is then the only knob.

    Args:
        batch: of the whole step, before it is cut into mini-batches or spread over ranks.
        log_probs: float32 ``[rows, seq - 1]`` of the current policy at T=1.
    """
    if not _detaches(batch.actuation):
        return batch
    main = batch.loss_mask & ~batch.auxiliary[:, None]
    current = log_probs[main].double()
    advantages = batch.advantages[:, None].expand_as(main)[main].double()
    covariance = (current - current.mean()) * (advantages - advantages.mean())
    count = max(1, int(batch.actuation.command * covariance.numel()))
    kept = torch.ones_like(current, dtype=torch.float32)
    kept[covariance.topk(count).indices] = 0.0
    token_weights = torch.ones_like(main, dtype=torch.float32)
    token_weights[main] = kept
    return replace(batch, token_weights=token_weights)


def _detaches(actuation: Actuation) -> bool:
    """Whether Clip-Cov is asked to detach any token."""
    return actuation.kind == "clip_cov" and actuation.command > 0


@dataclass(frozen=True)
class _Row:
    prompt: Prompt
    sample: Sample
    advantage: float
    auxiliary: bool


def _usable(sample: Sample) -> bool:
    return sample.finish_reason != "abort" and len(sample.token_ids) > 0


def _actuation(decision: ControlDecision, config: RunConfig) -> Actuation:
    actuator = acting(config.entropy)
    return Actuation() if actuator is None else Actuation(actuator.name, decision.command, config.entropy.alpha)


def _main_rows(main: Sequence[SampleGroup], objective: ObjectiveConfig) -> list[_Row]:
    rows = []
    for group in main:
        samples = [sample for sample in group.samples if _usable(sample)]
        advantages = group_advantages(np.array([s.reward for s in samples]), objective.advantage)
        rows += [_Row(group.prompt, s, a, False) for s, a in zip(samples, advantages.tolist(), strict=True)]
    return rows


def _main_weights(lengths: np.ndarray, config: RunConfig) -> np.ndarray:
    """Float64 ``[rows]``, so that the sum of weight * term over tokens is the configured mean."""
    match config.objective.aggregation:
        case "token_mean":
            return np.full(len(lengths), 1 / lengths.sum())
        case "sequence_mean":
            return 1 / (len(lengths) * lengths)
        case "dr_grpo":
            return np.full(len(lengths), 1 / (len(lengths) * config.rollout.max_new_tokens))
        case other:
            raise ValueError(f"objective.aggregation={other!r}: use token_mean, sequence_mean or dr_grpo")


def _positive_weights(lengths: np.ndarray, correct: np.ndarray, alpha: float, mean: str) -> np.ndarray:
    """Float32 ``[rows]``, 0 on incorrect ones."""
    if mean not in ("positives", "samples"):
        raise ValueError(f"entropy.positive_mean={mean!r}: use positives or samples")
    each = 1 / max(1, lengths[correct].sum()) if mean == "positives" else 1 / (len(lengths) * lengths)
    return np.where(correct, alpha * each, 0.0).astype(np.float32)


def _assemble(
    rows: list[_Row],
    weights: np.ndarray,
    pad_token_id: int,
    actuation: Actuation,
    positive_weights: torch.Tensor | None,
) -> TrainBatch:
    """Lay the rows out as padded tensors."""
    prompts = {row.prompt.id: np.array(row.prompt.token_ids, np.int64) for row in rows}
    starts = np.array([len(prompts[row.prompt.id]) for row in rows])
    if not starts.all():
        empty = next(row.prompt.id for row in rows if not row.prompt.token_ids)
        raise ValueError(f"prompt {empty!r} has no tokens: its response would have no first prediction")
    ends = starts + np.array([len(row.sample.token_ids) for row in rows])
    column = np.arange(ends.max())
    response = (column >= starts[:, None]) & (column < ends[:, None])
    tokens = np.full(response.shape, pad_token_id, np.int64)
    tokens[column < starts[:, None]] = np.concatenate([prompts[row.prompt.id] for row in rows])
    tokens[response] = np.concatenate([row.sample.token_ids for row in rows])
    mask = response[:, 1:]
    behavior = np.zeros(mask.shape, np.float32)
    behavior[mask] = np.concatenate([row.sample.log_probs for row in rows])
    return TrainBatch(
        tokens=torch.from_numpy(tokens),
        lengths=torch.from_numpy(ends),
        loss_mask=torch.from_numpy(mask.copy()),
        weights=torch.from_numpy(weights.astype(np.float32)),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        auxiliary=torch.tensor([row.auxiliary for row in rows]),
        correct=torch.tensor([row.sample.correct for row in rows]),
        temperatures=torch.tensor([row.sample.temperature for row in rows], dtype=torch.float32),
        behavior_log_probs=torch.from_numpy(behavior),
        actuation=actuation,
        positive_weights=positive_weights,
    )
