"""Rules between keys of ``objective``: losses, advantages, token shapings and sampling rules.

They hold for their parameters and for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.errors import Problem
from pipeline.config.schema import ADVANTAGES, LOSSES, SHAPINGS, CutsConfig, ObjectiveConfig, RunConfig

_OFF_POLICY_LOSSES = ("gspo", "cispo", "ce_gppo", "kl_cov", "mcpo")  # at a ratio of exactly 1 they have PPO's gradient
_ROW_SHAPINGS = ("entrocraft",)  # the same weight and advantage for all tokens of a response


def objective_problems(config: RunConfig) -> Iterator[Problem]:
    """Every combination of objective keys that cannot work, or in which one of them would have no effect."""
    yield from _idle_parameters(config.objective)
    yield from _loss(config)
    yield from _dual_clip(config)
    yield from _correction(config)
    yield from _old_log_probs(config)
    yield from _max_age(config)
    yield from _gspo(config.objective)
    yield from _shaping(config)
    yield from _rlrt(config)
    yield from _lengths(config)
    yield from _cuts(config)


def _idle_parameters(objective: ObjectiveConfig) -> Iterator[Problem]:
    """Parameters of a method that is not in use."""
    in_use = {objective.advantage, objective.loss, *objective.token_shaping}
    switches = {
        **{name: f"objective.advantage={name}" for name in ADVANTAGES},
        **{name: f"objective.loss={name}" for name in LOSSES},
        **{name: f"objective.token_shaping=[{name}]" for name in SHAPINGS},
    }
    for method, switch in switches.items():
        parameters = getattr(objective, method, None)
        if parameters is None or method in in_use or parameters == type(parameters)():
            continue
        default = type(parameters)()
        name, value = next((n, v) for n, v in vars(parameters).items() if v != getattr(default, n))
        yield Problem(
            f"objective.{method}.{name}", value, f"has no effect without {switch}", f"remove it, or set {switch}"
        )


def _loss(config: RunConfig) -> Iterator[Problem]:
    objective, updates = config.objective, config.learner.updates_per_step
    if objective.loss in _OFF_POLICY_LOSSES and updates == 1 and config.rollout.staleness == 0:
        yield Problem(
            "objective.loss",
            objective.loss,
            "with learner.updates_per_step=1 and rollout.staleness=0 every ratio is exactly 1, "
            "where this loss has the gradient of ppo",
            "set learner.updates_per_step to 2 or more, or objective.loss=ppo",
        )
    if objective.dual_clip > 0 and objective.loss not in ("ppo", "htpo", "mcpo"):
        yield Problem(
            "objective.dual_clip",
            objective.dual_clip,
            f"loss {objective.loss} has bounds of its own",
            "set it to 0, or objective.loss=ppo",
        )
    if objective.advantage == "pass_at_k" and objective.pass_at_k.samples >= config.rollout.samples_per_prompt:
        yield Problem(
            "objective.pass_at_k.samples",
            objective.pass_at_k.samples,
            f"pass@k of {config.rollout.samples_per_prompt} samples (rollout.samples_per_prompt) needs fewer than all "
            "of them",
            "lower it, or raise rollout.samples_per_prompt",
        )


def _dual_clip(config: RunConfig) -> Iterator[Problem]:
    if 0 < config.objective.dual_clip <= 1:
        yield Problem(
            "objective.dual_clip",
            config.objective.dual_clip,
            "a bound of the ratio at or below 1 would clip every negative sample",
            "use 0 (off) or a number above 1, e.g. 10",
        )


def _correction(config: RunConfig) -> Iterator[Problem]:
    correction = config.objective.correction
    if correction.kind == "tis" and correction.low > 0:
        yield Problem(
            "objective.correction.low",
            correction.low,
            "has no effect with objective.correction.kind=tis, which truncates large weights only",
            "set it to 0, or objective.correction.kind=mis",
        )
    if correction.kind != "none" and config.rollout.staleness and config.objective.old_log_probs == "engine":
        yield Problem(
            "objective.correction.kind",
            correction.kind,
            "has no effect on stale rows, whose ratio is already taken to what the engine told (rollout.staleness="
            f"{config.rollout.staleness}, objective.old_log_probs=engine)",
            "set objective.old_log_probs=learner, or objective.correction.kind=none",
        )


def _old_log_probs(config: RunConfig) -> Iterator[Problem]:
    objective = config.objective
    if objective.old_log_probs == "engine":
        return
    if not config.rollout.staleness:
        yield Problem(
            "objective.old_log_probs",
            objective.old_log_probs,
            "has no effect with rollout.staleness=0, where no older weights draw",
            "remove it, or set rollout.staleness",
        )
    elif objective.correction.kind == "none":
        yield Problem(
            "objective.old_log_probs",
            objective.old_log_probs,
            "nothing would make up for the age of the rows: their ratio begins at 1 whatever drew them",
            "set objective.correction.kind=tis or mis, or objective.old_log_probs=engine",
        )


def _max_age(config: RunConfig) -> Iterator[Problem]:
    age, rollout = config.objective.max_age, config.rollout
    if age and not (rollout.partial and age < rollout.staleness):
        yield Problem(
            "objective.max_age",
            age,
            f"has no effect, or leaves nothing to train on: rollout.staleness={rollout.staleness} bounds the age, and "
            "without rollout.partial all tokens of a response are of one",
            "set it below rollout.staleness, with rollout.partial=true, or to 0",
        )


def _gspo(objective: ObjectiveConfig) -> Iterator[Problem]:
    if objective.loss != "gspo":
        return
    if objective.aggregation != "sequence_mean":
        yield Problem(
            "objective.aggregation",
            objective.aggregation,
            "gspo's ratio belongs to a sequence, and its objective is a mean of sequences",
            "set objective.aggregation=sequence_mean",
        )
    of_tokens = [name for name in objective.token_shaping if name not in _ROW_SHAPINGS]
    if of_tokens:
        yield Problem(
            "objective.token_shaping",
            of_tokens,
            "gspo clips whole sequences, these give single tokens weights or advantages",
            "remove them, or set objective.loss=ppo",
        )


def _shaping(config: RunConfig) -> Iterator[Problem]:
    objective, updates = config.objective, config.learner.updates_per_step
    names = objective.token_shaping
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield Problem("objective.token_shaping", names, f"{', '.join(twice)} is named twice", "name each once")
    if "opefo" in names and updates > 1:
        yield Problem(
            "learner.updates_per_step",
            updates,
            "opefo balances the entropy change of one update by the policy that drew the rows (strictly on-policy)",
            "set it to 1, or remove opefo from objective.token_shaping",
        )
    if "opefo" in names and config.rollout.staleness:
        yield Problem(
            "rollout.staleness",
            config.rollout.staleness,
            "opefo balances the entropy change of one update by the policy that drew the rows (strictly on-policy)",
            "set it to 0, or remove opefo from objective.token_shaping",
        )
    if "opefo" in names[:-1]:
        yield Problem(
            "objective.token_shaping",
            names,
            "what comes after opefo upsets the balance that it makes",
            "name opefo last",
        )
    actuator = config.entropy.actuator
    if actuator in names and config.entropy.controller != "none":
        yield Problem(
            "entropy.actuator",
            actuator,
            f"weighs the tokens that objective.token_shaping=[{actuator}] weighs already",
            f"remove {actuator} from objective.token_shaping, or choose another actuator",
        )
    if "clip_cov" in names and objective.clip_cov.low >= objective.clip_cov.high:
        yield Problem(
            "objective.clip_cov.low",
            objective.clip_cov.low,
            f"not below objective.clip_cov.high ({objective.clip_cov.high:g})",
            "swap or widen them",
        )


def _rlrt(config: RunConfig) -> Iterator[Problem]:
    learner, length = config.learner, 2 * config.longest_row
    if "rlrt" in config.objective.token_shaping and 0 < learner.max_tokens_per_micro_batch < length:
        yield Problem(
            "learner.max_tokens_per_micro_batch",
            learner.max_tokens_per_micro_batch,
            f"cannot hold a row of rlrt's teacher, which has a worked example before it: up to {length} tokens",
            f"use at least {length}, or remove rlrt from objective.token_shaping",
        )


def _lengths(config: RunConfig) -> Iterator[Problem]:
    overlong, limit = config.objective.overlong, config.rollout.max_new_tokens
    if overlong.buffer and config.data.environment.name != "single":
        yield Problem(
            "objective.overlong.buffer",
            overlong.buffer,
            "rollout.max_new_tokens bounds each answer of an episode, not their sum",
            "set it to 0, or data.environment.name=single",
        )
    if overlong.buffer > limit:
        yield Problem(
            "objective.overlong.buffer",
            overlong.buffer,
            f"longer than a response (rollout.max_new_tokens = {limit})",
            f"use at most {limit}",
        )
    if not overlong.buffer and overlong.penalty != type(overlong)().penalty:
        yield Problem(
            "objective.overlong.penalty",
            overlong.penalty,
            "has no effect while objective.overlong.buffer is 0",
            "remove it, or set objective.overlong.buffer",
        )


def _cuts(config: RunConfig) -> Iterator[Problem]:
    cuts, samples = config.rollout.cuts, config.rollout.samples_per_prompt
    if cuts.share > 0 and config.rollout.engine != "native":
        yield Problem(
            "rollout.cuts.share",
            cuts.share,
            f"engine {config.rollout.engine} has no such sampling rule",
            "set it to 0, or rollout.engine=native",
        )
    if cuts.share > 0 and round(cuts.share * samples) == 0:
        yield Problem(
            "rollout.cuts.share",
            cuts.share,
            f"is none of the {samples} samples of a prompt (rollout.samples_per_prompt)",
            "raise it",
        )
    for name, value in vars(cuts).items():
        if cuts.share == 0 and value != getattr(CutsConfig(), name):
            yield Problem(
                f"rollout.cuts.{name}",
                value,
                "has no effect while rollout.cuts.share is 0",
                "remove it, or set the share",
            )
