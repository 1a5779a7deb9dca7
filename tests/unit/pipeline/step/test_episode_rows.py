"""Tokens of tools, the environment and the template are context alone: no loss, entropy or figure counts them."""

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from pipeline.config.schema import ADVANTAGES, LOSSES, SHAPINGS, CorrectionConfig, DataConfig, OverlongConfig, RunConfig
from pipeline.evaluation.evaluate import measure
from pipeline.monitoring.samples import described
from pipeline.monitoring.step_record import episode_figures, rollout_figures
from pipeline.objectives.loss import PolicyOutputs, TokenRows, policy_loss, reduce_metrics
from pipeline.rewards.stage import VerifierStage
from pipeline.step.batch import build_batch
from pipeline.step.kept import choose
from pipeline.step.kept import measure as measure_kept
from pipeline.step.prepare import prepare
from pipeline.step.waiting import Drawn, drawn_of, plain_of
from pipeline.types import ControlDecision, Prompt, Role, Sample, SampleGroup, StepSamples, Turn, WeightSpan

VOCABULARY = 40
TABLE = (2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
DECISION = ControlDecision(1.3, 1.3, 4, "tracking", "", target=0.5, filtered_entropy=0.4)
MASKS = ([1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1], [1, 0, 0, 0, 0, 1])


class Policy:
    """A learner whose next-token distribution follows from the last token alone."""

    def log_probs(self, batch, *, reference=False):
        return self.statistics(batch)["log_probs"] * (0.9 if reference else 1.0)

    def statistics(self, batch):
        where = batch.loss_mask.nonzero()[:, 0]
        log_p = TABLE[batch.tokens[where - 1].long()]
        entropy = -(log_p.exp() * log_p).sum(-1)
        moment = (log_p.exp().square() * (log_p + entropy[:, None])).sum(-1)
        taken = log_p.gather(1, batch.tokens[where, None].long())[:, 0]
        return {"log_probs": taken, "entropy": entropy, "moment": moment}


def episode(number, mask, role, *, leak):
    """With ``leak``, whatever nobody drew and no drawn token is predicted from is absurd."""
    draw = np.random.default_rng(number)
    drawn = np.array(mask, bool)
    tokens = draw.integers(1, VOCABULARY, len(mask))
    log_probs = np.where(drawn, -draw.exponential(1.0, len(mask)), 0.0).astype(np.float32)
    if leak:
        unread = ~drawn & ~np.append(drawn[1:], False)
        tokens[unread] = 39
        log_probs[~drawn] = np.float32(-1e30)
    ends = [end for end in range(1, len(mask) + 1) if drawn[end - 1] and (end == len(mask) or not drawn[end])]
    starts = [start for start in range(len(mask)) if drawn[start] and (start == 0 or not drawn[start - 1])]
    return Sample(
        tokens,
        log_probs,
        1.3 if role is Role.AUXILIARY else 1.0,
        number,
        role,
        "length" if number % 4 == 3 else "stop",
        (WeightSpan(3, 0, 2), WeightSpan(4, 2, len(mask))),
        reward=float(number % 2),
        correct=number % 2 == 1,
        drawn=drawn,
        turns=tuple(Turn(start, end, "stop") for start, end in zip(starts, ends, strict=True)),
        stop_reason="done",
    )


def groups(role, *, leak, name="p"):
    samples = [episode(number, mask, role, leak=leak) for number, mask in enumerate(MASKS)]
    prompts = [Prompt(f"{name}{i}", (1, 2, 3 + i), "?", "7", "exact") for i in range(2)]
    return [SampleGroup(prompt, tuple(samples[2 * i :] + samples[: 2 * i]), role) for i, prompt in enumerate(prompts)]


def config(**changes):
    run = RunConfig()
    run.rollout.max_new_tokens = 8
    for key, value in changes.items():
        section = next(s for s in (run.entropy, run.objective, run.rollout, run.learner) if hasattr(s, key))
        setattr(section, key, value)
    return run


def trained(run, *, leak, staleness=0):
    """Gradient and every metric of one update."""
    batch = build_batch(groups(Role.MAIN, leak=leak), groups(Role.AUXILIARY, leak=leak), DECISION, run)
    batch = prepare(replace(batch, staleness=staleness), Policy(), run, 3)
    said = Policy().statistics(batch)
    log_probs = said["log_probs"].clone().requires_grad_()
    tempered = said["log_probs"] * 0.7
    outputs = PolicyOutputs(log_probs, said["entropy"], tempered, said["moment"])
    loss, sums = policy_loss(outputs, TokenRows.of(batch), run.objective)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    plain = {name: value.tolist() for name, value in batch.tensors().items() if name not in ("tokens", "loss_mask")}
    return {"loss": loss.item(), "gradient": gradient.tolist(), **reduce_metrics(sums), **plain}


CASES = (
    [{"loss": name, "updates_per_step": 2} for name in LOSSES]
    + [{"token_shaping": [name]} for name in SHAPINGS]
    + [{"advantage": name} for name in ADVANTAGES]
    + [{"aggregation": name} for name in ("token_mean", "sequence_mean", "dr_grpo")]
    + [
        {"actuator": name}
        for name in ("reweight", "fc", "dcpo", "tok", "entropy_bonus", "clip_cov", "surprisal", "stare", "clip_high")
    ]
    + [{"positive_mean": name} for name in ("positives", "samples", "main")]
    + [{"overlong": OverlongConfig(buffer=6)}, {"overlong": OverlongConfig(filter=True)}, {"kl_coef": 0.1}]
    + [
        {"correction": CorrectionConfig(kind, level, low=0.1)}
        for kind in ("tis", "mis")
        for level in ("token", "sequence")
    ]
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_figure_of_an_update_knows_what_nobody_drew(case):
    run, staleness = config(**case), 2 if "loss" in case else 0
    clean, leaky = (json.dumps(trained(run, leak=leak, staleness=staleness)) for leak in (False, True))
    assert leaky == clean  # as text, in which NaN equals NaN and every digit counts


def test_targets_are_the_drawn_tokens():
    batch = build_batch(groups(Role.MAIN, leak=True), [], DECISION, config())
    masks = [MASKS[i] for i in (0, 1, 2, 3, 2, 3, 0, 1)]
    assert batch.targets.tolist() == [sum(mask) for mask in masks]
    assert batch.lengths.tolist() == [3 + len(mask) for mask in masks]
    assert batch.loss_mask.int().tolist() == [bit for mask in masks for bit in (0, 0, 0, *mask)]
    assert (batch.behavior_log_probs > -100).all()
    assert batch.weights.tolist() == pytest.approx([1 / sum(map(sum, masks))] * 8)


class Decoder:
    def decode_batch(self, sequences):
        return [" ".join(map(str, ids.tolist())) for ids in sequences]


def figures(*, leak):
    """What a step's record, an evaluation and the sample files say."""
    stage = VerifierStage(DataConfig(verifier="exact"), Decoder())
    main = stage.verify(groups(Role.MAIN, leak=leak))
    samples = StepSamples(main, groups(Role.AUXILIARY, leak=leak), 0)
    kept = measure_kept(choose(samples, 8, 0), Policy(), 0)
    assert [len(each.entropies) for each in kept] == [each.sample.drawn_tokens for each in kept]
    files = [{**described(each, 0, None), "seed": 0} for each in kept]
    return (
        {**rollout_figures(samples), **episode_figures(samples)},
        samples.ages(5),
        asdict(measure(main, [1, 2], seconds=0.0, seed=0)),
        files,
    )


def test_no_figure_of_a_step_knows_what_nobody_drew():
    clean = figures(leak=False)
    assert clean == figures(leak=True)
    record, ages, evaluation, files = clean
    drawn = sum(map(sum, MASKS))
    assert record["tokens"] == {"main": 2 * drawn, "auxiliary": 2 * drawn}
    assert (record["turns"], record["done"]) == (7 / 4, 1.0)
    assert record["given_tokens"] == (sum(map(len, MASKS)) - drawn) / 4
    assert record["response_length"] == evaluation["mean_length"] == drawn / 4
    assert ages["share_2"] == pytest.approx((2 + 1 + 2 + 1) / drawn)
    assert files[0]["log_probs"][2:5] == files[0]["entropies"][2:5] == [None] * 3
    assert files[0]["turns"] == [[0, 2, "stop"], [5, 7, "stop"]]
    assert files[0]["tokens"] == 4


def same(one, other):
    for old, new in zip(one.samples, other.samples, strict=True):
        assert old.token_ids.tolist() == new.token_ids.tolist()
        assert old.log_probs.tolist() == new.log_probs.tolist()
        assert (old.drawn is None) == (new.drawn is None)
        assert old.drawn is None or (old.drawn.tolist() == new.drawn.tolist() and new.drawn.dtype == bool)
        for name in ("turns", "stop_reason", "weight_versions", "reward", "seed"):
            assert getattr(old, name) == getattr(new, name)


def test_an_episode_survives_pickling_and_a_checkpoint():
    mixed = [
        replace(group, samples=(*group.samples, replace(group.samples[0], drawn=None, turns=(), stop_reason="")))
        for group in groups(Role.MAIN, leak=False)
    ]
    same(mixed[0], pickle.loads(pickle.dumps(mixed[0])))
    fields, arrays = plain_of([Drawn(3, DECISION, StepSamples(mixed, [], 0))])
    (back,) = drawn_of(json.loads(json.dumps(fields)), arrays)
    for old, new in zip(mixed, back.samples.main, strict=True):
        same(old, new)
