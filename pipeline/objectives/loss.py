"""The policy loss of one update, token by token.

Everything a token needs comes with it in ``TokenRows``, its normalisation included, so the loss is a plain sum: the
same whatever the micro-batch size, the order of rows or the number of ranks.

The terms, each times the token's weight (``r`` = pi / pi_old, both at T=1; A the advantage):

- main rows: the surrogate that ``objective.loss`` names (``losses``; by default PPO's, clipped), times the token's
  weight of ``shaping``; k3 KL to a reference (Schulman), whose gradient is not that of the KL it estimates: public code
  may multiply it by r / sg(r) for that (2506.09477), which is not done here; what the actuator adds (below).
  ``correction`` may multiply the surrogate, and the positive term of ``reweight``, by a detached weight against the
  mismatch of engine and learner; KL and entropy bonus are left alone, and so are all denominators: a masked token
  counts in them and adds 0.
- auxiliary rows: SCOPE-RL's positive term (2510.08141 v7), ``min(r, clip(r, 1 - eps_low, 1 + eps_high))`` with the
  constant advantage 1 and no importance weight, neither for the temperature the row was drawn at nor against the
  mismatch.

Actuators, with ``u`` the command, ``c`` in {0, 1} the row's correctness, ``pi_T`` the policy at temperature T = u:

- ``resample``: only through the auxiliary rows.
- ``reweight``: correct main rows carry a positive term too, each token weighted by pi_T / pi (DCPO's idea, 2601.12730,
  here as a sum of its own instead of a mixture with the advantage).
- ``fc``: A += alpha c (min(pi_T / pi, 8) - 1), the same centred: exactly 0 at T=1.
- ``tok``: A += u c clip(-(log pi + H), -3, 3), with H the token's exact entropy.
- ``entropy_bonus``: loss -= u H.
- ``dcpo``: A <- (1 - alpha) A + alpha c pi_T / pi (2601.12730), with alpha set by the distance to the target
  (``batch``).
- ``high_prob``: A -= u |A| on tokens of probability above 0.95: loss += -u mean(-r |A|) over them (EntroPIC,
  2511.15248), here inside the clipped surrogate, the same where r = 1, and divided by all tokens' number, not by
  theirs alone.
- ``surprisal``: A <- A max(0, 1 - u sign(A) log pi) (REPO-R, 2603.11682).
- ``clip_cov``: ``token_weights`` takes the tokens of highest covariance out of the surrogate (2505.22617).
- ``stare``: ``token_weights`` is 1 + u on the most surprising tokens of rows with A > 0 (STARE, 2606.19236).
- ``clip_high``: the surrogate clips ratios above 1 + clip_high + u (MAI-Thinking-1; ADAPO, 2603.11682).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives import correction, influence, mismatch
from pipeline.objectives.losses._inputs import Inputs, ratio_of
from pipeline.registry import load
from pipeline.types import Actuation, TrainBatch

FC_MAX_RATIO = 8.0  # as measured; keeps one rare token from outweighing the rest
# Never reached by the policy's own samples; stops a token on whose probability the engine and the learner disagree.
REWEIGHT_MAX_RATIO = 100.0
TOK_MAX_SURPRISE = 3.0  # nats
HIGH_PROBABILITY = 0.95  # as published

SENSOR_MAX_WEIGHT = 2.0
SENSOR_SUMS = ("sensor_sum", "sensor_count")
# Sums over main tokens, and the name of their mean.
_TOKEN_MEANS = {
    "entropy_sum": "entropy",
    "kl_sum": "kl",
    "ratio_sum": "ratio",
    "clip_sum": "clip_fraction",
}


@dataclass(frozen=True)
class TokenRows:
    """What the loss must know of each masked target, ``[n]`` each, in the order of ``TrainBatch``."""

    row: torch.Tensor  # int64, which row of the batch; rows are never cut
    weights: torch.Tensor  # float32
    advantages: torch.Tensor  # float32
    auxiliary: torch.Tensor  # bool
    correct: torch.Tensor  # bool
    behavior_log_probs: torch.Tensor  # float32, at the temperature of the row
    actuation: Actuation
    old_log_probs: torch.Tensor | None = None  # float32, T=1; None: the policy itself, ratio exactly 1
    reference_log_probs: torch.Tensor | None = None  # float32, T=1
    token_weights: torch.Tensor | None = None  # float32
    positive_weights: torch.Tensor | None = None  # float32
    marks: torch.Tensor | None = None  # uint8, see ``losses``
    stale: bool = False  # whether other weights drew the rows

    @classmethod
    def of(cls, batch: TrainBatch) -> TokenRows:
        """Of a batch, or a micro-batch of it, on whatever device it lies."""
        row = batch.row_of_target
        return cls(
            row=row,
            weights=batch.weights[row],
            advantages=batch.advantages[row] if batch.token_advantages is None else batch.token_advantages,
            auxiliary=batch.auxiliary[row],
            correct=batch.correct[row],
            behavior_log_probs=batch.behavior_log_probs,
            actuation=batch.actuation,
            old_log_probs=batch.old_log_probs,
            reference_log_probs=batch.reference_log_probs,
            token_weights=batch.token_weights,
            positive_weights=None if batch.positive_weights is None else batch.positive_weights[row],
            marks=batch.marks,
            stale=batch.staleness > 0,
        )


@dataclass(frozen=True)
class PolicyOutputs:
    """What the model says of the same targets, float32 ``[n]`` each, nats."""

    log_probs: torch.Tensor  # T=1, differentiable
    entropy: torch.Tensor  # exact, T=1; differentiable where ``entropy_needs_grad``
    tempered: torch.Tensor | None = None  # log-probs at ``tempered_at``, no gradient
    moment: torch.Tensor | None = None  # sum_k pi_k^2 (log pi_k + H), no gradient; None: no entropy-change metrics


def tempered_at(actuation: Actuation) -> float | None:
    """The temperature at which the loss needs a second log-probability of every target, if any."""
    return actuation.command if actuation.kind in ("reweight", "fc", "dcpo") and actuation.alpha > 0 else None


def entropy_needs_grad(actuation: Actuation) -> bool:
    """Whether the loss differentiates the entropy (an entropy bonus that is on)."""
    return actuation.kind == "entropy_bonus" and actuation.command != 0


def policy_loss(
    outputs: PolicyOutputs, rows: TokenRows, objective: ObjectiveConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of these tokens, and its metrics as sums.

    Returns:
        The scalar to differentiate, and detached scalars to be added over micro-batches and data-parallel ranks (keys
        that end in ``_max``: take the maximum), then given to ``reduce_metrics``. ``policy_loss``, ``positive_term``
        (to be maximised; alpha included) are shares of the loss, already normalised. All others count main tokens only.
    """
    log_probs = outputs.log_probs
    if rows.actuation.kind == "clip_high":
        objective = replace(objective, clip_high=objective.clip_high + rows.actuation.command)
    old = log_probs.detach() if rows.old_log_probs is None else rows.old_log_probs
    ratio = ratio_of(log_probs - old)
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    positive = torch.minimum(ratio, clipped)
    advantages = _advantages(outputs, rows)
    inputs = Inputs(log_probs, old, ratio, advantages, rows.row, rows.marks)
    losses, bounded = load("pipeline.objectives.losses", objective.loss).surrogate(inputs, objective)
    if rows.token_weights is not None:
        losses = losses * rows.token_weights
    main = ~rows.auxiliary
    log_ratio = torch.where(main, old - rows.behavior_log_probs, 0.0)
    importance, corrected = correction.importance_weights(log_ratio, rows.row, main, objective.correction)
    policy = rows.weights * importance * losses
    term = torch.where(rows.auxiliary, -rows.weights * positive, policy)
    reward = torch.where(rows.auxiliary, rows.weights * positive, 0.0)  # the positive term, for the metric
    if rows.positive_weights is not None:
        reweighted = rows.positive_weights * importance * _tempered_ratio(outputs, REWEIGHT_MAX_RATIO) * positive
        term = term - reweighted
        reward = reward + reweighted
    if entropy_needs_grad(rows.actuation):
        bonus = rows.actuation.command * rows.weights * outputs.entropy
        term = term - torch.where(rows.auxiliary, 0.0, bonus)
    kl = torch.zeros_like(ratio)
    if rows.reference_log_probs is not None:
        # Masked before exp: an overflow that ``where`` hides after it would still give a NaN gradient.
        gap = torch.where(rows.auxiliary, 0.0, rows.reference_log_probs - log_probs)
        kl = torch.exp(gap) - gap - 1
        term = term + objective.kl_coef * rows.weights * kl
    sums = _main_sums(outputs, rows, ratio, bounded, kl)
    sums |= corrected
    if not (rows.stale and objective.old_log_probs == "engine"):  # there nobody knows the learner's at equal weights
        sums |= mismatch.mismatch_sums(log_ratio, main)
    if rows.stale:
        sums |= _sensor_sums(outputs, rows)
    sums["policy_loss"] = _total(policy, main)
    sums["positive_term"] = _total(reward)
    sums |= influence.covariance_sums(log_probs, advantages, main)
    loss = term.sum()
    if outputs.moment is not None and loss.requires_grad:
        sums |= influence.entropy_change_sums(loss, log_probs, outputs.entropy, outputs.moment, rows.auxiliary)
    return loss, sums


def reduce_metrics(sums: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """Turn summed metrics into what people read: means and quantiles over main tokens, the mean entropy of a row over
    main rows, maxima, shares of the loss as they are.
    """
    values = {name: float(value) for name, value in sums.items()}
    tokens = values.pop("main_tokens")
    values = {name: value for name, value in values.items() if name not in SENSOR_SUMS}
    compared = "mismatch_max" in values
    averaged = _TOKEN_MEANS | (mismatch.MEANS if compared else {})
    means = {mean: values.pop(name) / tokens if tokens else math.nan for name, mean in averaged.items()}
    rows = values.pop("main_rows")
    means["entropy_sequence_mean"] = values.pop("entropy_row_sum") / rows if rows else math.nan
    means["covariance"] = influence.covariance([values.pop(name) for name in influence.COVARIANCE_SUMS], tokens)
    if compared:
        counts = [values.pop(name) for name in mismatch.BINS]
        means["mismatch_p99"] = mismatch.quantile(counts, 0.99, values["mismatch_max"])
    corrected = {name: values.pop(name) for name in correction.SUMS & values.keys()}
    return {**means, **correction.metrics(corrected), **values}


def _tempered_ratio(outputs: PolicyOutputs, limit: float) -> torch.Tensor:
    """pi_T / pi of every target, at most ``limit``; no gradient."""
    if outputs.tempered is None:
        raise ValueError("PolicyOutputs.tempered is missing: compute the log-probs at tempered_at(actuation) as well")
    return torch.exp(outputs.tempered - outputs.log_probs.detach()).clamp(max=limit)


def _advantages(outputs: PolicyOutputs, rows: TokenRows) -> torch.Tensor:
    """The advantage of every token, the actuator's share included."""
    act = rows.actuation
    if act.kind == "fc" and act.alpha > 0:
        return rows.advantages + act.alpha * rows.correct * (_tempered_ratio(outputs, FC_MAX_RATIO) - 1)
    if act.kind == "dcpo" and act.alpha > 0:
        mixed = act.alpha * rows.correct * _tempered_ratio(outputs, REWEIGHT_MAX_RATIO)
        return (1 - act.alpha) * rows.advantages + mixed
    if act.kind == "tok" and act.command != 0:
        surprise = -(outputs.log_probs + outputs.entropy).detach()
        return rows.advantages + act.command * rows.correct * surprise.clamp(-TOK_MAX_SURPRISE, TOK_MAX_SURPRISE)
    if act.kind == "high_prob" and act.command != 0:
        sure = (outputs.log_probs.detach() > math.log(HIGH_PROBABILITY)) & ~rows.auxiliary
        return rows.advantages - act.command * rows.advantages.abs() * sure
    if act.kind == "surprisal" and act.command != 0:
        surprise = -outputs.log_probs.detach()
        return rows.advantages * (1 + act.command * rows.advantages.sign() * surprise).clamp(min=0)
    return rows.advantages


@torch.no_grad()
def _sensor_sums(outputs: PolicyOutputs, rows: TokenRows) -> dict[str, torch.Tensor]:
    """What the entropy reading is made of where other weights drew the rows: tokens weigh min(pi / pi_behaviour, 2)."""
    weights = torch.exp(outputs.log_probs - rows.behavior_log_probs).clamp(max=SENSOR_MAX_WEIGHT)
    main = ~rows.auxiliary
    return {"sensor_sum": _total(weights * outputs.entropy, main), "sensor_count": _total(weights, main)}


def _total(values: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Detached float64 sum, so that 10^6 tokens add up to the last digit."""
    values = values.detach().double()
    return (values if where is None else torch.where(where, values, 0.0)).sum()


@torch.no_grad()
def _main_sums(
    outputs: PolicyOutputs,
    rows: TokenRows,
    ratio: torch.Tensor,
    bounded: torch.Tensor,
    kl: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Counts and sums over the main tokens."""
    main = ~rows.auxiliary
    per_row = 1 / rows.row.bincount()[rows.row].double()  # a row's tokens together weigh 1; micro-batches cut no row
    return {
        "main_tokens": _total(main),
        "main_rows": _total(per_row, main),
        "entropy_row_sum": _total(outputs.entropy.double() * per_row, main),
        "entropy_sum": _total(outputs.entropy, main),
        "kl_sum": _total(kl, main),
        "ratio_sum": _total(ratio, main),
        "clip_sum": _total(bounded, main),
    }
