"""The predicted entropy change against what a step does to a tabular softmax, where the identity is exact to first
order.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import CorrectionConfig, ObjectiveConfig
from pipeline.objectives.loss import PolicyOutputs, TokenRows, policy_loss, reduce_metrics
from pipeline.types import Actuation

TOKENS, VOCABULARY = 40, 6
ALONE = Actuation()


def of_policy(logits, drawn, temperature=1.0):
    """What the model says of the tokens ``drawn`` from these logits ``[n, v]``."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    moment = (p.square() * (log_p + entropy[:, None])).sum(-1).detach()
    tempered = (logits.detach() / temperature).log_softmax(-1)
    chosen = [each.gather(1, drawn[:, None])[:, 0] for each in (log_p, tempered)]
    return PolicyOutputs(chosen[0], entropy, chosen[1], moment)


def problem(seed, actuation=ALONE, **changes):
    """Logits, drawn tokens, and rows of a loss with everything in it.

    Off-policy, weights, auxiliary rows, a reference.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn(TOKENS, VOCABULARY, generator=g, dtype=torch.float64)).requires_grad_(True)
    drawn = torch.randint(VOCABULARY, (TOKENS,), generator=g)
    now = of_policy(logits, drawn).log_probs.detach()
    auxiliary = torch.arange(TOKENS) >= TOKENS - 8
    rows = dict(
        row=torch.arange(TOKENS) // 4,
        weights=torch.rand(TOKENS, generator=g),
        advantages=torch.randn(TOKENS, generator=g),
        auxiliary=auxiliary,
        correct=torch.rand(TOKENS, generator=g) < 0.5,
        behavior_log_probs=now + 0.1 * torch.randn(TOKENS, generator=g),
        actuation=actuation,
        old_log_probs=now + 0.2 * torch.randn(TOKENS, generator=g),
        reference_log_probs=now + torch.randn(TOKENS, generator=g),
        token_weights=2 * torch.rand(TOKENS, generator=g),
        positive_weights=torch.rand(TOKENS, generator=g) if actuation.kind == "reweight" else None,
    )
    return logits, drawn, TokenRows(**(rows | changes))


def measured(logits, drawn, rows, objective, temperature=1.0, eta=1e-5):
    """The loss's sums, and the change of every token's entropy per unit of learning rate in one step of gradient
    descent.
    """
    before = of_policy(logits, drawn, temperature)
    loss, sums = policy_loss(before, rows, objective)
    (slope,) = torch.autograd.grad(loss, logits)
    after = of_policy(logits.detach() - eta * slope, drawn)
    return sums, (after.entropy - before.entropy.detach()) / eta


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "ce_gppo", "kl_cov", "htpo"])
@pytest.mark.parametrize(
    "actuation", [ALONE, Actuation("reweight", 1.4, 1.0), Actuation("fc", 1.4, 0.5), Actuation("tok", 0.5)]
)
def test_predicted_change_is_what_a_step_does(loss, actuation):
    objective = ObjectiveConfig(loss=loss, kl_coef=0.3, correction=CorrectionConfig(kind="tis", high=1.05))
    temperature = actuation.command if actuation.kind in ("reweight", "fc") else 1.0
    logits, drawn, rows = problem(1, actuation)
    sums, change = measured(logits, drawn, rows, objective, temperature)
    assert sums["entropy_change"].item() == pytest.approx(change.sum().item(), rel=1e-3, abs=1e-4)
    aux = change[rows.auxiliary].sum().item()
    assert sums["entropy_change_auxiliary"].item() == pytest.approx(aux, rel=1e-3, abs=1e-4)
    parts = [sums[f"entropy_change_{part}"].item() for part in ("positive", "negative", "auxiliary")]
    assert sum(parts) == pytest.approx(sums["entropy_change"].item(), abs=1e-9)


def test_positives_and_negatives_are_told_apart():
    """On policy a token is pushed up where A > 0; the sum over tokens of 1/n A g is the mean of A g."""
    plain = {"old_log_probs": None, "reference_log_probs": None, "token_weights": None}
    plain |= {"auxiliary": torch.zeros(TOKENS, dtype=torch.bool), "weights": torch.full((TOKENS,), 1 / TOKENS)}
    logits, drawn, rows = problem(2, **plain)
    sums, change = measured(logits, drawn, rows, ObjectiveConfig())
    for part, where in (("positive", rows.advantages > 0), ("negative", rows.advantages < 0)):
        assert sums[f"entropy_change_{part}"].item() == pytest.approx(change[where].sum().item(), rel=1e-3, abs=1e-5)
    assert sums["entropy_change_auxiliary"].item() == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 10))
def test_sums_add_up_over_rows(seed, cut):
    logits, drawn, rows = problem(seed)

    def part(which):
        own = {k: v[which] if isinstance(v, torch.Tensor) else v for k, v in vars(rows).items()}
        return policy_loss(of_policy(logits[which], drawn[which]), TokenRows(**own), ObjectiveConfig())[1]

    index = torch.arange(TOKENS)
    whole, first, second = part(index), part(index[: 4 * cut]), part(index[4 * cut :])
    for name in whole:
        if name.startswith("entropy_change") or name.endswith(("log_prob_sum", "advantage_sum")):
            assert first[name] + second[name] == pytest.approx(whole[name].item(), abs=1e-9)


def test_covariance_is_that_of_main_tokens():
    logits, drawn, rows = problem(3)
    outputs = of_policy(logits, drawn)
    _, sums = policy_loss(outputs, rows, ObjectiveConfig())
    main = ~rows.auxiliary
    x, y = outputs.log_probs.detach()[main], rows.advantages.double()[main]
    expected = ((x - x.mean()) * (y - y.mean())).mean().item()
    metrics = reduce_metrics(sums)
    assert metrics["covariance"] == pytest.approx(expected, rel=1e-9)
    assert {"log_prob_sum", "advantage_sum", "log_prob_advantage_sum"}.isdisjoint(metrics)


def test_without_the_moment_or_a_gradient_there_is_no_prediction():
    logits, drawn, rows = problem(4)
    outputs = of_policy(logits, drawn)
    bare = PolicyOutputs(outputs.log_probs, outputs.entropy)
    assert not any(name.startswith("entropy_change") for name in policy_loss(bare, rows, ObjectiveConfig())[1])
    still = of_policy(logits.detach(), drawn)
    assert not any(name.startswith("entropy_change") for name in policy_loss(still, rows, ObjectiveConfig())[1])
