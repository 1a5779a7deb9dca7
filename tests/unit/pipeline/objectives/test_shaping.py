"""Every token shaping against its formula in plain Python, and that the step is its only frame."""

import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import SHAPINGS as NAMES
from pipeline.config.schema import ClipCovConfig, KlCovConfig, RunConfig
from pipeline.entropy.actuator import PACKAGE, actuator_called
from pipeline.objectives.losses import htpo, kl_cov, mcpo
from pipeline.objectives.shape import ACTUATORS, shape_tokens, shapes_tokens
from pipeline.objectives.shaping import clip_cov, rlrt, stare
from pipeline.objectives.tokens import Tokens
from pipeline.registry import load, names
from pipeline.step.prepare import prepare
from pipeline.types import Actuation
from tests.grids import ragged, rows_of

VOCABULARY = 5
SHAPINGS = {name: load("pipeline.objectives.shaping", name).shape for name in NAMES}
MARKS = {"kl_cov": kl_cov.mark, "htpo": htpo.mark, "mcpo": mcpo.mark}


def config(*shaping, loss="ppo", **parameters):
    run = RunConfig()
    run.objective.token_shaping, run.objective.loss = list(shaping), loss
    run.entropy.controller = "none"
    for name, value in parameters.items():
        setattr(run.objective, name, value)
    return run


def policy(n, seed=0, scale=1.5):
    """Per token: float64 log-probs of all columns and a drawn one; log-prob, entropy and moment of it."""
    g = torch.Generator().manual_seed(seed)
    log_p = (scale * torch.randn(n, VOCABULARY, generator=g, dtype=torch.float64)).log_softmax(-1)
    p, token = log_p.exp(), torch.randint(VOCABULARY, (n,), generator=g)
    entropy = -(p * log_p).sum(-1)
    moment = (p.square() * (log_p + entropy[:, None])).sum(-1)
    return log_p, token, log_p.gather(1, token[:, None])[:, 0], entropy, moment


def tokens(seed=0, lengths=(3, 1, 4, 2), correct=(True, False, True, False), **fields):
    """One prompt's responses; advantages +1 and -1/2."""
    row = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    *_, log_probs, entropy, moment = policy(len(row), seed)
    right = torch.tensor(correct)[row]
    base = dict(
        log_probs=log_probs,
        entropy=entropy,
        moment=moment,
        row=row,
        correct=right,
        accuracy=torch.full((len(row),), fmean(correct), dtype=torch.float64),
        weights=torch.full((len(row),), 1 / len(row), dtype=torch.float64),
        advantages=torch.where(right, 1.0, -0.5).double(),
        scale=torch.ones(len(row), dtype=torch.float64),
    )
    return Tokens(**(base | fields))


def covariances(t):
    log_probs, advantages = t.log_probs.tolist(), t.advantages.tolist()
    return [(x - fmean(log_probs)) * (a - fmean(advantages)) for x, a in zip(log_probs, advantages, strict=True)]


def approx(numbers):
    return pytest.approx(numbers, rel=1e-9, abs=1e-12)


def test_entropy_change_is_that_of_a_tabular_policy():
    """Each token's logits move by step x A (onehot - pi), as policy gradient has it; its entropy moves as predicted."""
    log_p, token, log_probs, entropy, moment = policy(200)
    advantages = torch.linspace(-2, 2, 200, dtype=torch.float64)
    t = tokens(
        lengths=(200,),
        correct=(True,),
        log_probs=log_probs,
        entropy=entropy,
        moment=moment,
        advantages=advantages,
        scale=torch.full((200,), 0.5, dtype=torch.float64),
    )
    onehot = torch.nn.functional.one_hot(token, VOCABULARY).double()
    step = 1e-5
    moved = (log_p + step * 0.5 * advantages[:, None] * (onehot - log_p.exp())).log_softmax(-1)
    measured = (-(moved.exp() * moved).sum(-1) - entropy) / step
    torch.testing.assert_close(t.entropy_change, measured, rtol=1e-3, atol=1e-4)


def test_gaussian_cov():
    t = tokens()
    c = covariances(t)
    variance = fmean(x * x for x in c) - fmean(c) ** 2
    w = [math.exp(-x * x / (2 * variance)) for x in c]
    expected = [a * x * len(w) / sum(w) for a, x in zip(t.advantages.tolist(), w, strict=True)]
    assert SHAPINGS["gaussian_cov"](t, config(), 0).advantages.tolist() == approx(expected)
    same = replace(t, advantages=torch.ones_like(t.advantages))
    assert SHAPINGS["gaussian_cov"](same, config(), 0) is same  # no covariance to speak of


def test_entropy_adv():
    t = tokens()
    pairs = zip(t.advantages.tolist(), t.entropy.tolist(), strict=True)
    expected = [a + min(0.4 * h, abs(a) / 2) for a, h in pairs]
    shaped = SHAPINGS["entropy_adv"](t, config(), 0).advantages
    assert shaped.tolist() == approx(expected)
    assert (shaped.sign() == t.advantages.sign()).all()
    assert len({a < 0 for a in expected}) == 2


def test_high_entropy_keeps_the_top_fifth():
    entropy = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.8, 0.2, 0.0, 0.5, 0.4, 0.6], dtype=torch.float64)
    shaped = SHAPINGS["high_entropy"](tokens(entropy=entropy), config(), 0)
    assert shaped.scale.tolist() == [0, 1, 0, 1, 1, 0, 0, 0, 0, 0]  # two, and what equals the second


def test_stare_acts_below_its_target_only():
    run = config()
    run.objective.stare.negative, run.objective.stare.fraction = 0.9, 0.3
    t = tokens(log_probs=-torch.arange(10.0, dtype=torch.float64))
    assert SHAPINGS["stare"](t, run, 0) is t  # mean entropy above 0.3
    shaped = SHAPINGS["stare"](replace(t, entropy=t.entropy * 0.1), run, 0)
    # positives are tokens 0-2 and 4-7, negatives 3, 8, 9: the ceil(.3 x 7) and ceil(.3 x 3) most surprising
    assert shaped.scale.tolist() == approx([1, 1, 1, 1, 1, 1.1, 1.1, 1.1, 1, 0.9])


def test_the_actuator_stare_weighs_the_most_surprising_tenth_of_positives():
    t = tokens(log_probs=-torch.arange(10.0, dtype=torch.float64))
    # positives are tokens 0-2 and 4-7: ceil(.1 x 7) of them, whatever the entropy
    assert stare.amplify(t, 0.3).scale.tolist() == approx([1] * 7 + [1.3, 1, 1])
    assert {name for name in names(PACKAGE) if actuator_called(name).statistics} == set(ACTUATORS)


def test_opefo_cancels_the_predicted_entropy_change():
    t = tokens(seed=3)
    change = (t.entropy_change * t.weights).tolist()
    up, down = sum(x for x in change if x > 0), -sum(x for x in change if x < 0)
    balance = (down - up) / (down + up)
    shaped = SHAPINGS["opefo"](t, config(), 0)
    assert up > 0
    assert down > 0
    assert shaped.scale.tolist() == approx([1 + balance if x > 0 else 1 - balance for x in change])
    assert (shaped.entropy_change * t.weights).sum().item() == approx(0)
    still = replace(t, advantages=0 * t.advantages)
    assert SHAPINGS["opefo"](still, config(), 0) is still


def test_entrocraft_learns_from_one_side_outside_the_band():
    run = config("entrocraft")
    run.steps, run.entropy.band = 11, replace(run.entropy.band, low=0.6, high=0.7, end_low=0.4, end_high=0.5)
    run.entropy.band.schedule = "linear"

    def shaped(entropy, step=0):
        t = tokens(entropy=torch.full((10,), entropy, dtype=torch.float64))
        t = SHAPINGS["entrocraft"](t, run, step)
        return (t.advantages * t.scale).tolist()

    right = [True, True, True, False, True, True, True, True, False, False]
    assert shaped(0.65) == [1.0 if r else -0.5 for r in right]
    assert shaped(0.75) == [1.0 if r else 0.0 for r in right]
    assert shaped(0.55) == [0.0 if r else -0.5 for r in right]
    assert shaped(0.55, step=11) == [1.0 if r else 0.0 for r in right]  # the band has come down to [.4, .5]


def test_clip_cov_draws_among_tokens_between_its_limits():
    t = tokens(log_probs=torch.linspace(-8, 0, 10, dtype=torch.float64))
    c = covariances(t)
    run = config(clip_cov=ClipCovConfig(fraction=0.2, low=0.1, high=max(c)))
    candidates = {i for i, x in enumerate(c) if 0.1 < x < max(c)}
    assert 2 < len(candidates) < 9
    drawn = [
        {i for i, x in enumerate(SHAPINGS["clip_cov"](t, run, step).scale.tolist()) if x == 0} for step in range(30)
    ]
    assert all(len(each) == 2 and each <= candidates for each in drawn)
    assert set.union(*drawn) == candidates
    assert SHAPINGS["clip_cov"](t, run, 4).scale.tolist() == SHAPINGS["clip_cov"](t, run, 4).scale.tolist()
    none = config(clip_cov=ClipCovConfig(low=50.0, high=60.0))
    assert SHAPINGS["clip_cov"](t, none, 0).scale.tolist() == [1.0] * 10


def test_covariance_tops():
    t = tokens(log_probs=torch.linspace(-8, 0, 10, dtype=torch.float64))
    ranked = sorted(range(10), key=covariances(t).__getitem__, reverse=True)
    held = MARKS["kl_cov"](t, config(kl_cov=KlCovConfig(fraction=0.3)), 0).marks
    assert held.nonzero()[:, 0].tolist() == sorted(ranked[:3])
    assert MARKS["kl_cov"](t, config(), 0).marks.nonzero().tolist() == [[ranked[0]]]  # at least one
    assert (clip_cov.detach_top(t, 0.3).scale == 0).nonzero()[:, 0].tolist() == sorted(ranked[:3])


def test_mcpo_marks_the_tokens_of_prompts_that_are_always_answered():
    t = tokens()
    accuracy = torch.where(t.row % 2 == 0, 1.0, 0.96).double()
    marks = MARKS["mcpo"](replace(t, accuracy=accuracy), config(), 0).marks
    assert marks.tolist() == [int(row % 2 == 0) for row in t.row.tolist()]


def test_htpo_splits_responses_by_entropy():
    entropy = torch.tensor([*range(10), *range(10), *range(10)], dtype=torch.float64)
    run = config(loss="htpo")
    run.objective.htpo.skip_low, run.objective.htpo.skip_high = 0.4, 0.5
    t = tokens(lengths=(10, 10), correct=(True, False), entropy=entropy[:20])
    hard = MARKS["htpo"](replace(t, accuracy=0 * t.accuracy + 0.5), run, 0)
    # the top two are high; of the eight low ones the third lowest is the limit: two lie below
    assert hard.marks.tolist() == [0] * 8 + [1, 1] + [0] * 8 + [2, 2]
    assert hard.scale.tolist() == [0, 0] + [1] * 18
    easy = MARKS["htpo"](replace(t, accuracy=0 * t.accuracy + 0.6), run, 0)
    assert easy.marks.tolist() == [0] * 18 + [2, 2]
    assert easy.scale.tolist() == [1] * 9 + [0] + [1] * 10  # the highest of two


def test_rlrt_modulates_correct_responses_by_the_teacher():
    t = tokens()
    teacher = t.log_probs + torch.linspace(-0.4, 0.4, 10, dtype=torch.float64)
    expected = []
    for a, right, d in zip(t.advantages.tolist(), t.correct.tolist(), (t.log_probs - teacher).tolist(), strict=True):
        ratio = min(max(math.exp(math.copysign(1, a) * d), 0.8), 1.2) if right else 1.0
        expected.append(a * (0.5 + 0.5 * ratio))
    assert SHAPINGS["rlrt"](replace(t, teacher=teacher), config(), 0).advantages.tolist() == approx(expected)


def batch(rows, auxiliary=0, **fields):
    """A batch of (group, prompt length, response tokens, correct); the last ``auxiliary`` rows are auxiliary."""
    width = max(prompt + len(response) for _, prompt, response, _ in rows)
    grid = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for i, (group, prompt, response, _) in enumerate(rows):
        grid[i, :prompt] = 90 + group
        grid[i, prompt : prompt + len(response)] = torch.tensor(response)
        mask[i, prompt - 1 : prompt + len(response) - 1] = True
    correct = torch.tensor([right for *_, right in rows])
    base = dict(
        tokens=grid,
        lengths=torch.tensor([prompt + len(response) for _, prompt, response, _ in rows]),
        loss_mask=mask,
        weights=torch.full((len(rows),), 1 / int(mask.sum())),
        advantages=torch.where(correct, 1.0, -0.5),
        auxiliary=torch.arange(len(rows)) >= len(rows) - auxiliary,
        correct=correct,
        temperatures=torch.ones(len(rows)),
        behavior_log_probs=torch.zeros(mask.shape),
        groups=torch.tensor([group for group, *_ in rows]),
    )
    return ragged(**(base | fields))


def statistics_of(rows, seed=0):
    """``statistics`` of random policies, each token's its own; a teacher that differs."""
    _, _, log_probs, entropy, moment = policy(int(rows.targets.sum()), seed)
    found = {"log_probs": log_probs, "entropy": entropy, "moment": moment, "teacher": log_probs * 0.9}
    return {name: values.float() for name, values in found.items()}


ROWS = [
    (0, 2, [1, 2, 3], True),
    (0, 2, [4], False),
    (0, 2, [5, 6], True),
    (1, 1, [7, 8, 9, 1], False),
    (1, 1, [2], True),
    (1, 1, [3, 4], False),
    (-1, 2, [5, 5], True),
]


def shaped_fields(rows, order, name):
    """What ``shape_tokens`` says of every row, in the first order."""
    whole, full = batch([ROWS[i] for i in order], auxiliary=1), batch(ROWS, auxiliary=1)
    found = {
        name: torch.cat([values.split(full.targets.tolist())[i] for i in order])
        for name, values in statistics_of(full).items()
    }
    loss = name if name in MARKS else "ppo"
    run = config(*([] if name in MARKS else [name]), loss=loss, clip_cov=ClipCovConfig(1.0, -9.0, 9.0))
    run.objective.stare.target = 9.0
    run.objective.kl_cov.fraction = 0.3
    result = shape_tokens(whole, found, run, 0)
    back = torch.tensor(order).argsort()
    fields = (result.token_advantages, result.token_weights, result.marks)
    return [None if f is None else [f.split(whole.targets.tolist())[i] for i in back] for f in fields]


@pytest.mark.parametrize("name", [*SHAPINGS, *MARKS])
def test_order_of_rows_is_free_and_auxiliary_rows_are_left_alone(name):
    first = shaped_fields(ROWS, list(range(7)), name)
    moved = shaped_fields(ROWS, [4, 1, 0, 5, 3, 2, 6], name)
    assert any(field is not None for field in first)
    for mine, other in zip(first, moved, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other)
    neutral = (1.0, 1.0, 0)  # advantage of the auxiliary row, weight, mark
    for field, value in zip(first, neutral, strict=True):
        assert field is None or (field[-1] == value).all()


@settings(max_examples=15, deadline=None)
@given(st.permutations(["entropy_adv", "stare", "gaussian_cov", "high_entropy"]), st.integers(0, 3))
def test_shapings_compose_in_the_order_given(names, count):
    full = batch(ROWS, auxiliary=1)
    found = statistics_of(full)
    run = config(*names[:count])
    run.objective.stare.target = 9.0
    result = shape_tokens(full, found, run, 0)
    by_hand = Tokens.of(full, found)
    for name in names[:count]:
        by_hand = SHAPINGS[name](by_hand, run, 0)
    main = ~full.auxiliary[full.row_of_target]
    if result.token_advantages is not None:
        torch.testing.assert_close(result.token_advantages[main], by_hand.advantages.float())
    if result.token_weights is not None:
        torch.testing.assert_close(result.token_weights[main], by_hand.scale.float())
    assert (result.token_advantages is None) == (not {"entropy_adv", "gaussian_cov"} & set(names[:count]))
    assert (result.token_weights is None) == (not {"stare", "high_entropy"} & set(names[:count]))


def test_a_prompt_is_as_hard_as_its_main_responses_say():
    found = Tokens.of(batch(ROWS, auxiliary=1), statistics_of(batch(ROWS)))
    assert found.row.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5]
    assert found.accuracy.tolist() == pytest.approx([2 / 3] * 6 + [1 / 3] * 7)


def test_nothing_is_computed_where_nobody_asked():
    plain = batch(ROWS)
    assert not shapes_tokens(config(), plain)
    assert not shapes_tokens(config(), replace(plain, actuation=Actuation("clip_cov", 0.0)))
    assert shapes_tokens(config(), replace(plain, actuation=Actuation("clip_cov", 0.1)))
    assert shapes_tokens(config(), replace(plain, actuation=Actuation("stare", 0.1)))
    assert shapes_tokens(config("stare"), plain)
    assert shapes_tokens(config(loss="kl_cov"), plain)
    assert not shapes_tokens(config(loss="cispo"), plain)


def test_the_teacher_sees_a_peer_first():
    shown, rows = rlrt.teacher_batch(batch(ROWS, auxiliary=1))
    assert rows.tolist() == [0, 2]  # the only prompt with two correct responses; auxiliary rows are nobody's peers
    assert rows_of(shown.tokens, shown.lengths) == [[90, 90, 5, 6, 90, 90, 1, 2, 3], [90, 90, 1, 2, 3, 90, 90, 5, 6]]
    assert shown.lengths.tolist() == [9, 9]
    assert rows_of(shown.loss_mask.int(), shown.lengths) == [[0] * 6 + [1] * 3, [0] * 7 + [1] * 2]
    assert shown.targets.tolist() == [3, 2]
    assert rlrt.teacher_batch(batch([ROWS[0], ROWS[1], (0, 2, [1, 2, 3], True)])) is None  # the same response again


class ByPosition:
    """A learner whose log-prob of a target falls with the target's position in its sequence."""

    def log_probs(self, batch, *, reference=False):
        return torch.cat(
            [-0.1 * torch.arange(float(n))[-m:] for n, m in zip(batch.lengths, batch.targets, strict=True)]
        )

    def statistics(self, batch):
        zero = torch.zeros_like(batch.behavior_log_probs)
        return {"log_probs": self.log_probs(batch), "entropy": zero, "moment": zero}


def test_prepare_puts_the_teacher_beside_the_student():
    """Behind prompt and peer (4 and 5 tokens further), log-probs are .4 and .5 lower.

    Without a peer nothing changes.
    """
    run = config("rlrt")
    run.objective.rlrt.mix, run.objective.rlrt.clip = 1.0, 0.9
    prepared = prepare(batch(ROWS, auxiliary=1), ByPosition(), run, 0)
    found = rows_of(prepared.token_advantages, prepared.targets)
    assert found[0] == pytest.approx([math.exp(0.4)] * 3)
    assert found[1] == [-0.5]
    assert found[2] == pytest.approx([math.exp(0.5)] * 2)
    assert found[4] == [1.0]
    alone = prepare(batch(ROWS[1:]), ByPosition(), config("rlrt"), 0)
    assert torch.equal(alone.token_advantages, alone.advantages[alone.row_of_target])
